package main

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

func TestWhatIsGeneratedIsCurrent(t *testing.T) {
	const root = "../.."
	made, err := files(root)
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range made {
		got, err := os.ReadFile(filepath.Join(root, path))
		if err != nil {
			t.Error(err)
			continue
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s is not current; run: make generate", path)
		}
	}
}

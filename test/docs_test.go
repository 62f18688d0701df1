package test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestTheThreatModelAndTheLimitsNameTestsThatExist: a rule whose test was
// renamed or removed is a rule that nobody checks.
func TestTheThreatModelAndTheLimitsNameTestsThatExist(t *testing.T) {
	root := ".."
	exist := map[string]bool{}
	declared := regexp.MustCompile(`(?m)^func (Test\w+)\(`)
	if err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		text, err := os.ReadFile(path)
		for _, m := range declared.FindAllSubmatch(text, -1) {
			exist[string(m[1])] = true
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"threat-model.md", "limits.md"} {
		text, err := os.ReadFile(filepath.Join(root, "docs", file))
		if err != nil {
			t.Fatal(err)
		}
		named := regexp.MustCompile("`(Test\\w+)`").FindAllSubmatch(text, -1)
		if len(named) < 10 {
			t.Errorf("docs/%s names %d tests", file, len(named))
		}
		for _, m := range named {
			if !exist[string(m[1])] {
				t.Errorf("docs/%s names %s, which does not exist", file, m[1])
			}
		}
	}
}

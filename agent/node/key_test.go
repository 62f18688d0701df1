package node_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hallmark-id/hallmark/agent/node"
	"github.com/hallmark-id/hallmark/test/harness"
)

// onDisk returns what is in the file with the node's key.
func (w *world) onDisk(t *testing.T) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(w.options.Dir, "agent.pem"))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

const inTPM = "BEGIN TSS2 PRIVATE KEY"

func TestAKeyInAFileMovesIntoTheTPMAndIsOfNoUseWithoutIt(t *testing.T) {
	maker := harness.NewTPMMaker(t)
	device, other := maker.NewTPM(t), maker.NewTPM(t)
	synctest.Test(t, func(t *testing.T) {
		w := joined(t)
		if strings.Contains(w.onDisk(t), inTPM) {
			t.Fatal("the key is in a TPM already")
		}
		w.options.TPM = &node.TPM{Device: device.Socket}
		r := w.run(t)
		r.connected(t)
		time.Sleep(time.Minute)
		r.stop()
		moved := w.onDisk(t)
		if !strings.Contains(moved, inTPM) || strings.Contains(moved, "BEGIN PRIVATE KEY") {
			t.Fatalf("on disk is:\n%s", moved)
		}

		w.options.TPM = nil
		_, err := node.Open(w.options)
		wantError(t, err, "is in a TPM", "configure node_key.tpm")
		w.options.TPM = &node.TPM{Device: other.Socket}
		_, err = node.Open(w.options)
		wantError(t, err, "cannot be used on this machine", "of another TPM", "remove the file")
		w.options.TPM = &node.TPM{Device: "/nonexistent"}
		_, err = node.Open(w.options)
		wantError(t, err, "/nonexistent", "the identity stays as it is")
		if w.onDisk(t) != moved {
			t.Error("the identity on disk has changed")
		}

		w.options.TPM = &node.TPM{Device: device.Socket}
		w.run(t).connected(t)
	})
}

func TestANodeWhoseTPMIsAwayKeepsItsConnectionAndRenewsWhenItIsBack(t *testing.T) {
	device := harness.NewTPMMaker(t).NewTPM(t)
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		w.options.TPM = &node.TPM{Device: device.Socket}
		r := w.run(t)
		r.connected(t)
		first := w.onDisk(t)
		device.TakeAway(t)
		time.Sleep(40 * time.Minute) // it is time to renew
		s := r.Status()
		if !s.Connected || s.LastError == nil || !strings.Contains(s.LastError.Error(), "open the TPM") {
			t.Errorf("without its TPM: %+v", s)
		}
		if w.onDisk(t) != first {
			t.Error("without its TPM the identity on disk has changed")
		}
		device.BringBack(t)
		time.Sleep(10 * time.Minute)
		if s := r.Status(); !s.Connected || s.LastError != nil || w.onDisk(t) == first {
			t.Errorf("with its TPM again: %+v", s)
		}
	})
}

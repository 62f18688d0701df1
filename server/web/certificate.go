package web

import (
	"crypto/tls"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
)

// lookEvery is how often it is looked whether the files of a certificate have
// changed, at most.
const lookEvery = 5 * time.Second

// Files is a certificate with its key in two PEM files. It follows their
// changes: whatever renews it need not tell the server.
type Files struct {
	certificate, key string
	log              *slog.Logger

	mu     sync.Mutex
	now    *tls.Certificate
	read   [2]os.FileInfo // as of when now was read
	looked time.Time
	failed bool
}

// OpenFiles reads the files. The error names the one that is wrong.
func OpenFiles(certificate, key string, log *slog.Logger) (*Files, error) {
	f := &Files{certificate: certificate, key: key, log: log, looked: time.Now()}
	if err := f.load(); err != nil {
		return nil, err
	}
	return f, nil
}

// Certificate returns the newest that could be read.
func (f *Files) Certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if now := time.Now(); now.Sub(f.looked) >= lookEvery {
		f.looked = now
		if err := f.load(); err != nil {
			if !f.failed {
				f.log.Warn("the certificate of an endpoint cannot be read; the last one stays", "file", f.certificate, "error", err)
			}
			f.failed = true
		}
	}
	return f.now, nil
}

// load reads the files if they are other ones than those read last.
func (f *Files) load() error {
	var is [2]os.FileInfo
	same := f.now != nil
	for i, path := range []string{f.certificate, f.key} {
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		if !info.Mode().IsRegular() { // a pipe could keep the reader waiting for ever
			return fmt.Errorf("%s is no regular file", path)
		}
		is[i] = info
		same = same && os.SameFile(info, f.read[i]) && info.ModTime().Equal(f.read[i].ModTime()) && info.Size() == f.read[i].Size()
	}
	if same {
		return nil
	}
	pair, err := tls.LoadX509KeyPair(f.certificate, f.key)
	if err != nil {
		return fmt.Errorf("certificate %s with key %s: %w", f.certificate, f.key, err)
	}
	if f.now != nil {
		f.log.Info("an endpoint has a new certificate", "file", f.certificate, "expires_at", pair.Leaf.NotAfter)
	}
	f.now, f.read, f.failed = &pair, is, false
	return nil
}

package node

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/sys/unix"

	"github.com/hallmark-id/hallmark/attestors/tpm"
	"github.com/hallmark-id/hallmark/pkg/bundle"
)

// What a data directory holds.
const (
	svidFile   = "agent.pem"   // private key (PKCS#8, or one of a TPM's) and SVID chain, in one file so that they always fit together
	bundleFile = "bundle.json" // the own trust domain's bundle in SPIFFE's format
	lockFile   = "agent.lock"
)

const maxFile = 4 << 20 // bytes; far more than either file has

// dir is the data directory of one agent. The zero value is none: what is saved
// is forgotten.
type dir struct {
	path string
	lock *os.File
}

// openDir makes the directory if it is missing, and locks it against a second
// agent, whose SVID renewals would make this one's SVID worthless.
func openDir(path string) (*dir, error) {
	if path == "" {
		return nil, errors.New("missing data directory")
	}
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("make the agent's data directory: %w", err)
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("open the agent's data directory: %w", err)
	}
	if info.Mode().Perm()&0o022 != 0 {
		return nil, fmt.Errorf("data directory %s can be written by other users (mode %04o); give the agent one of its own with mode 0700", path, info.Mode().Perm())
	}
	lock, err := os.OpenFile(filepath.Join(path, lockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the agent's data directory: %w", err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("data directory %s is in use by another agent", path)
		}
		return nil, fmt.Errorf("lock the agent's data directory %s: %w", path, err)
	}
	return &dir{path: path, lock: lock}, nil
}

// close gives the lock back.
func (d *dir) close() error {
	if d.lock == nil {
		return nil
	}
	return d.lock.Close()
}

// read returns a file's content, or nil if there is none.
func (d *dir) read(name string) ([]byte, error) {
	if d.path == "" {
		return nil, nil
	}
	f, err := os.Open(filepath.Join(d.path, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxFile {
		return nil, fmt.Errorf("%s is larger than %d bytes", f.Name(), maxFile)
	}
	return data, nil
}

// write replaces a file: after a crash at any moment there is the old content
// or the new one, whole.
func (d *dir) write(name string, data []byte) error {
	if d.path == "" {
		return nil
	}
	f, err := os.CreateTemp(d.path, "."+name+".*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // fails once it is renamed
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if closed := f.Close(); err == nil {
		err = closed
	}
	if err != nil {
		return err
	}
	if err := os.Rename(f.Name(), filepath.Join(d.path, name)); err != nil {
		return err
	}
	return d.sync()
}

// sync makes renames and removals in the directory durable.
func (d *dir) sync() error {
	f, err := os.Open(d.path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

func (d *dir) saveSVID(s *svid) error {
	key, err := encodeKey(s.key)
	if err != nil {
		return fmt.Errorf("save identity: %w", err)
	}
	var b bytes.Buffer
	b.Write(key)
	for _, cert := range s.chain {
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}) // a Buffer takes everything
	}
	if err := d.write(svidFile, b.Bytes()); err != nil {
		return fmt.Errorf("save identity: %w", err)
	}
	return nil
}

// loadSVID returns nil if there is none. It checks that the identity is an
// agent's in the trust domain, but neither its end nor its authority; nor does it
// speak to a TPM that has the key.
func (d *dir) loadSVID(td spiffeid.TrustDomain, t *TPM) (*svid, error) {
	data, err := d.read(svidFile)
	if err != nil {
		return nil, fmt.Errorf("read identity: %w", err)
	}
	if data == nil {
		return nil, nil
	}
	s, err := parseSVID(data, t)
	if err != nil {
		return nil, fmt.Errorf("identity in %s is damaged: %w; remove the file to attest anew", filepath.Join(d.path, svidFile), err)
	}
	if !isAgent(s.id, td) {
		return nil, fmt.Errorf("data directory %s holds the identity %q, not one of an agent in trust domain %q; use another directory", d.path, s.id, td.Name())
	}
	return s, nil
}

func parseSVID(data []byte, t *TPM) (*svid, error) {
	s := &svid{}
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		switch block.Type {
		case "PRIVATE KEY", tpm.PEMType:
			key, err := parseKey(block, t)
			if err != nil {
				return nil, err
			}
			s.key = key
		case "CERTIFICATE":
			cert, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return nil, err
			}
			s.chain = append(s.chain, cert)
		}
	}
	if s.key == nil || len(s.chain) == 0 {
		return nil, errors.New("private key or certificate is missing")
	}
	if !samePublicKey(s.key, s.leaf()) {
		return nil, errors.New("private key and certificate do not belong together")
	}
	id, err := x509svid.IDFromCert(s.leaf())
	if err != nil {
		return nil, err
	}
	s.id, s.expiresAt = id, s.leaf().NotAfter
	return s, nil
}

func (d *dir) removeSVID() error {
	if err := d.remove(svidFile); err != nil {
		return fmt.Errorf("remove identity: %w", err)
	}
	return nil
}

// remove removes a file, if there is one.
func (d *dir) remove(name string) error {
	if d.path == "" {
		return nil
	}
	err := os.Remove(filepath.Join(d.path, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return d.sync()
}

func (d *dir) saveBundle(b *bundle.Bundle) error {
	data, err := marshalBundle(b)
	if err != nil {
		return fmt.Errorf("save bundle: %w", err)
	}
	if err := d.write(bundleFile, data); err != nil {
		return fmt.Errorf("save bundle: %w", err)
	}
	return nil
}

// SavedBundle returns the bundle that an agent left in its data directory, nil
// if there is none. It neither locks nor makes the directory.
func SavedBundle(path string, td spiffeid.TrustDomain) (*bundle.Bundle, error) {
	return (&dir{path: path}).loadBundle(td)
}

// loadBundle returns nil if there is none.
func (d *dir) loadBundle(td spiffeid.TrustDomain) (*bundle.Bundle, error) {
	data, err := d.read(bundleFile)
	if err != nil {
		return nil, fmt.Errorf("read bundle: %w", err)
	}
	if data == nil {
		return nil, nil
	}
	b, err := ParseTrustBundle(td, data)
	if err != nil {
		return nil, fmt.Errorf("bundle in %s is damaged: %w; remove the data directory's content to attest anew", filepath.Join(d.path, bundleFile), err)
	}
	return b, nil
}

// Package tpm is what the attestors of nodes with a TPM 2.0 have in common. It
// is no attestor.
//
// On the node, a [Device] is a TPM, which [Open] opens: it loads an endorsement
// key, activates a credential, quotes and certifies. On the server,
// [VerifyEndorsement] checks a manufacturer's certificate, [NewCredential]
// encrypts a secret for a TPM, and [Attested] reads what a TPM has signed. Both may
// have keys that stay in a TPM: [Device.CreateSigning] makes one, a [Signer] uses it.
//
// Of the structures that a node sends, the server takes as few as it can: what a
// key must be like is a template here, which the server fills in itself, rather
// than a claim of the node that is checked.
package tpm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxtpm"
)

// DefaultDevice is the kernel's TPM that several programs can use at once.
const DefaultDevice = "/dev/tpmrm0"

// maxResponse is the most that a TPM answers, in bytes.
const maxResponse = 4096

// Device is an open TPM. What is loaded into it must be flushed before it is
// closed: an emulator has no one else to do it.
type Device struct {
	transport.TPMCloser
}

// Open opens a TPM: a device, or the Unix socket of an emulator (the data channel
// of swtpm). The socket is used no longer than the context lives; a device answers
// within the kernel's own limits.
func Open(ctx context.Context, path string) (*Device, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	switch {
	case info.Mode()&os.ModeSocket != 0:
		conn, err := dial(ctx, path)
		if err != nil {
			return nil, err
		}
		stop := context.AfterFunc(ctx, func() { conn.Close() })
		return &Device{&socket{conn, stop}}, nil
	case info.Mode()&os.ModeCharDevice != 0:
		d, err := linuxtpm.Open(path)
		if err != nil {
			return nil, fmt.Errorf("open %s: %w", path, err)
		}
		return &Device{d}, nil
	}
	return nil, fmt.Errorf("%s is neither a device nor a socket", path)
}

// dial connects to an emulator. That serves one at a time, and only so many may
// queue (EAGAIN, unix(7)): whoever comes when they do asks again.
func dial(ctx context.Context, path string) (net.Conn, error) {
	const pause = 20 * time.Millisecond
	for {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unix", path)
		if !errors.Is(err, syscall.EAGAIN) {
			return conn, err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, err
		}
	}
}

// socket is a connection to an emulator.
type socket struct {
	conn net.Conn
	stop func() bool
}

// Send sends a command and returns its response. A TPM that has to write something
// down first says so, and is asked again, as the kernel does it with a device.
func (s *socket) Send(command []byte) ([]byte, error) {
	const attempts, pause = 5, 20 * time.Millisecond
	for attempt := 0; ; attempt++ {
		response, err := s.exchange(command)
		if err != nil || tpm2.TPMRC(binary.BigEndian.Uint32(response[6:])) != tpm2.TPMRCRetry || attempt == attempts {
			return response, err
		}
		time.Sleep(pause << attempt)
	}
}

func (s *socket) exchange(command []byte) ([]byte, error) {
	if _, err := s.conn.Write(command); err != nil {
		return nil, err
	}
	const header = 10 // bytes: tag, size, response code
	response := make([]byte, header, maxResponse)
	if _, err := io.ReadFull(s.conn, response); err != nil {
		return nil, fmt.Errorf("TPM's response: %w", err)
	}
	size := binary.BigEndian.Uint32(response[2:])
	if size < header || size > maxResponse {
		return nil, fmt.Errorf("TPM's response is %d bytes long", size)
	}
	response = response[:size]
	_, err := io.ReadFull(s.conn, response[header:])
	return response, err
}

func (s *socket) Close() error {
	s.stop()
	return s.conn.Close()
}

// Key is a key in a TPM.
type Key struct {
	Public *tpm2.TPMTPublic

	handle tpm2.NamedHandle
	auth   tpm2.Session
	flush  bool
}

// password authorizes the use of a key.
func (k *Key) password() tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: k.handle.Handle, Name: k.handle.Name, Auth: k.auth}
}

// Flush removes a key from the TPM's memory.
func (d *Device) Flush(k *Key) {
	if k != nil && k.flush {
		// What fails here fails the next command that needs the memory.
		_, _ = tpm2.FlushContext{FlushHandle: k.handle.Handle}.Execute(d)
	}
}

// CreatePrimary makes a primary key of a hierarchy. The same template makes the
// same key again.
func (d *Device) CreatePrimary(hierarchy tpm2.TPMHandle, password string, template tpm2.TPMTPublic) (*Key, error) {
	created, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.AuthHandle{Handle: hierarchy, Auth: tpm2.PasswordAuth([]byte(password))},
		InPublic:      tpm2.New2B(template),
	}.Execute(d)
	if err != nil {
		return nil, err
	}
	k := &Key{
		handle: tpm2.NamedHandle{Handle: created.ObjectHandle, Name: created.Name},
		auth:   tpm2.PasswordAuth(nil),
		flush:  true,
	}
	if k.Public, err = created.OutPublic.Contents(); err != nil {
		d.Flush(k)
		return nil, err
	}
	return k, nil
}

// Load loads a key that a parent protects, in the form in which the TPM gave it
// out.
func (d *Device) Load(parent *Key, public, private []byte, password string) (*Key, error) {
	loaded, err := tpm2.Load{
		ParentHandle: parent.password(),
		InPrivate:    tpm2.TPM2BPrivate{Buffer: private},
		InPublic:     tpm2.BytesAs2B[tpm2.TPMTPublic](public),
	}.Execute(d)
	if err != nil {
		return nil, err
	}
	return &Key{
		handle: tpm2.NamedHandle{Handle: loaded.ObjectHandle, Name: loaded.Name},
		auth:   tpm2.PasswordAuth([]byte(password)),
		flush:  true,
	}, nil
}

// Saved is a copy of a key that was in the TPM's memory, encrypted by the TPM. It
// can be restored until the machine is started anew.
type Saved struct {
	context tpm2.TPMSContext
	key     Key
}

// Save makes a copy of a key, which is to be flushed afterwards.
func (d *Device) Save(k *Key) (*Saved, error) {
	saved, err := tpm2.ContextSave{SaveHandle: k.handle.Handle}.Execute(d)
	if err != nil {
		return nil, fmt.Errorf("save a key: %w", err)
	}
	return &Saved{saved.Context, *k}, nil
}

// Restore puts a key back.
func (d *Device) Restore(s *Saved) (*Key, error) {
	loaded, err := tpm2.ContextLoad{Context: s.context}.Execute(d)
	if err != nil {
		return nil, fmt.Errorf("load a key again: %w", err)
	}
	k := s.key
	k.handle.Handle = loaded.LoadedHandle
	return &k, nil
}

// Certify has one key state that another is in the same TPM. It returns the
// TPMS_ATTEST and its signature.
func (d *Device) Certify(ak, of *Key) ([]byte, *tpm2.TPMTSignature, error) {
	certified, err := tpm2.Certify{
		ObjectHandle: of.password(),
		SignHandle:   ak.password(),
		InScheme:     tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
	}.Execute(d)
	if err != nil {
		return nil, nil, fmt.Errorf("certify a key: %w", err)
	}
	return certified.CertifyInfo.Bytes(), &certified.Signature, nil
}

// Sign signs a digest with a key that is not restricted, in the way that the key
// itself says.
func (d *Device) Sign(k *Key, digest []byte) (*tpm2.TPMTSignature, error) {
	signed, err := tpm2.Sign{
		KeyHandle:  k.password(),
		Digest:     tpm2.TPM2BDigest{Buffer: digest},
		InScheme:   tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
		Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck, Hierarchy: tpm2.TPMRHNull},
	}.Execute(d)
	if err != nil {
		return nil, err
	}
	return &signed.Signature, nil
}

// LoadEndorsementKey finds the endorsement key of a kind where it is kept, or
// makes it anew, which can take a minute.
func (d *Device) LoadEndorsementKey(kind Kind, password string) (*Key, error) {
	e := endorsement[kind]
	if read, err := (tpm2.ReadPublic{ObjectHandle: e.persistent}).Execute(d); err == nil {
		public, err := read.OutPublic.Contents()
		if err != nil {
			return nil, err
		}
		if isKind(public, kind) {
			return &Key{Public: public, handle: tpm2.NamedHandle{Handle: e.persistent, Name: read.Name}, auth: tpm2.PasswordAuth(nil)}, nil
		}
	}
	k, err := d.CreatePrimary(tpm2.TPMRHEndorsement, password, e.template)
	if err != nil {
		return nil, fmt.Errorf("make the endorsement key: %w", err)
	}
	return k, nil
}

// Activate decrypts a credential that was made for an endorsement key and the
// name of another key of this TPM.
func (d *Device) Activate(ek, ak *Key, password string, c Credential) ([]byte, error) {
	// The TCG's templates have the endorsement key used by whoever may use the
	// endorsement hierarchy.
	session := tpm2.Policy(tpm2.TPMAlgSHA256, 16, func(t transport.TPM, session tpm2.TPMISHPolicy, nonce tpm2.TPM2BNonce) error {
		_, err := tpm2.PolicySecret{
			AuthHandle:    tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth([]byte(password))},
			PolicySession: session,
			NonceTPM:      nonce,
		}.Execute(t)
		return err
	})
	activated, err := tpm2.ActivateCredential{
		ActivateHandle: ak.password(),
		KeyHandle:      tpm2.AuthHandle{Handle: ek.handle.Handle, Name: ek.handle.Name, Auth: session},
		CredentialBlob: tpm2.TPM2BIDObject{Buffer: c.IDObject},
		Secret:         tpm2.TPM2BEncryptedSecret{Buffer: c.Secret},
	}.Execute(d)
	if err != nil {
		return nil, fmt.Errorf("activate the credential: %w", err)
	}
	return activated.CertInfo.Buffer, nil
}

// Quote signs PCRs of the SHA-256 bank. It returns the TPMS_ATTEST and its
// signature.
func (d *Device) Quote(ak *Key, qualifying []byte, pcrs []uint) ([]byte, *tpm2.TPMTSignature, error) {
	quote, err := tpm2.Quote{
		SignHandle:     ak.password(),
		QualifyingData: tpm2.TPM2BData{Buffer: qualifying},
		InScheme:       tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
		PCRSelect:      selection(pcrs),
	}.Execute(d)
	if err != nil {
		return nil, nil, fmt.Errorf("quote: %w", err)
	}
	return quote.Quoted.Bytes(), &quote.Signature, nil
}

// ReadPCRs returns PCRs of the SHA-256 bank, in the order of their numbers.
func (d *Device) ReadPCRs(pcrs []uint) ([][]byte, error) {
	var out [][]byte
	for _, n := range pcrs { // a TPM chooses how many it tells at once
		read, err := tpm2.PCRRead{PCRSelectionIn: selection([]uint{n})}.Execute(d)
		if err != nil {
			return nil, fmt.Errorf("read PCR %d: %w", n, err)
		}
		if len(read.PCRValues.Digests) != 1 {
			return nil, fmt.Errorf("the TPM has no PCR %d in its SHA-256 bank", n)
		}
		out = append(out, read.PCRValues.Digests[0].Buffer)
	}
	return out, nil
}

func selection(pcrs []uint) tpm2.TPMLPCRSelection {
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{
		Hash:      tpm2.TPMAlgSHA256,
		PCRSelect: tpm2.PCClientCompatible.PCRs(pcrs...),
	}}}
}

// EndorsementCertificate returns the certificate of an endorsement key that its
// manufacturer put into the TPM, or nil if there is none.
func (d *Device) EndorsementCertificate(kind Kind) ([]byte, error) {
	index := endorsement[kind].certificate
	public, err := tpm2.NVReadPublic{NVIndex: index}.Execute(d)
	if errors.Is(err, tpm2.TPMRCHandle) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("find the endorsement key's certificate: %w", err)
	}
	nv, err := public.NVPublic.Contents()
	if err != nil {
		return nil, err
	}
	const block = 512 // bytes that every TPM reads at once
	named := tpm2.NamedHandle{Handle: index, Name: public.NVName}
	out := make([]byte, 0, nv.DataSize)
	for len(out) < int(nv.DataSize) {
		read, err := tpm2.NVRead{
			AuthHandle: tpm2.AuthHandle{Handle: named.Handle, Name: named.Name, Auth: tpm2.PasswordAuth(nil)},
			NVIndex:    named,
			Size:       min(block, nv.DataSize-uint16(len(out))),
			Offset:     uint16(len(out)),
		}.Execute(d)
		if err != nil {
			return nil, fmt.Errorf("read the endorsement key's certificate: %w", err)
		}
		if len(read.Data.Buffer) == 0 {
			return nil, errors.New("read the endorsement key's certificate: the TPM breaks off")
		}
		out = append(out, read.Data.Buffer...)
	}
	return firstDER(out)
}

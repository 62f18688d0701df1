package kms

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"go.step.sm/crypto/kms/apiv1"
)

const (
	// callTime bounds what a service is asked once, another try included.
	callTime = 10 * time.Second
	// listTime bounds a look at all keys, which takes many questions.
	listTime = time.Minute
	// retryPause is between a question that failed and the second try.
	retryPause = 100 * time.Millisecond
	// probePause is between two questions to a service that cannot be used.
	probePause = time.Second
	// maxCalls is how many questions are open at once.
	maxCalls = 64
	// maxKeys bounds the keys of one server that are listed.
	maxKeys = 1000
)

// Key is a key in a service.
type Key struct {
	Name    string
	Created time.Time
}

// service is one where keys are. Its errors may pass, if they are not an
// [apiv1.NotFoundError], an [apiv1.AlreadyExistsError] or a refusal.
type service interface {
	create(ctx context.Context, name string, t keyType) error
	find(ctx context.Context, name string) (*found, error)
	remove(ctx context.Context, name string) error
	list(ctx context.Context) ([]Key, error)
}

// found is a key in a service.
type found struct {
	public crypto.PublicKey
	// sign signs a digest of the hash that goes with the key. Signatures are DER
	// of ECDSA, or of PKCS #1 v1.5.
	sign func(ctx context.Context, digest []byte) ([]byte, error)
}

// refusal is the word of a service that will not change by asking again.
type refusal struct{ error }

// manager is the key manager of a service. While that cannot be used, one
// question a second is let through; the others are answered at once.
type manager struct {
	what string // the service
	svc  service
	log  *slog.Logger

	ctx    context.Context // until it is closed
	cancel context.CancelFunc
	probes sync.WaitGroup
	calls  chan struct{}

	mu      sync.Mutex
	failure error // why it cannot be used now; nil: it can
	again   func(context.Context) error
	tried   time.Time
	trying  bool
}

func newManager(what string, svc service, log *slog.Logger) *manager {
	m := &manager{what: what, svc: svc, log: log, calls: make(chan struct{}, maxCalls)}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	return m
}

// answered tells an answer of the service's from a failure of it.
func answered(err error) bool {
	var refused refusal
	return err == nil || errors.As(err, &refused) ||
		errors.Is(err, apiv1.NotFoundError{}) || errors.Is(err, apiv1.AlreadyExistsError{})
}

// admit lets a question through, or says why not.
func (m *manager) admit() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.ctx.Err() != nil:
		return fmt.Errorf("%w: the key manager was closed", ErrUnavailable)
	case m.failure == nil:
		return nil
	case m.trying || time.Since(m.tried) < probePause:
		return m.failure
	}
	m.trying = true
	return nil
}

// settle takes down how a question went that signing depends on. If it failed,
// the same is asked again to find out whether the service is back.
func (m *manager) settle(err error, again func(context.Context) error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.trying, m.tried = false, time.Now()
	if answered(err) {
		if m.failure != nil {
			m.log.Info("the key service can be used again", "service", m.what)
			m.failure, m.again = nil, nil
		}
		return err
	}
	if m.ctx.Err() == nil && m.failure == nil {
		m.log.Error("the key service cannot be used; nothing is signed until it is back", "service", m.what, "error", err)
	}
	m.failure, m.again = fmt.Errorf("%w: %s: %w", ErrUnavailable, m.what, err), again
	return m.failure
}

// need asks what signing depends on.
func (m *manager) need(do func(context.Context) error) error {
	if err := m.admit(); err != nil {
		return err
	}
	return m.settle(m.ask(callTime, do), do)
}

// want asks what signing does not depend on: a failure is the caller's alone.
func (m *manager) want(limit time.Duration, do func(context.Context) error) error {
	err := m.ask(limit, do)
	if !answered(err) {
		err = fmt.Errorf("%w: %s: %w", ErrUnavailable, m.what, err)
	}
	return err
}

// ask asks, and once more if the service failed.
func (m *manager) ask(limit time.Duration, do func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(m.ctx, limit)
	defer cancel()
	select {
	case m.calls <- struct{}{}:
		defer func() { <-m.calls }()
	case <-ctx.Done():
		return fmt.Errorf("%d questions wait for an answer", maxCalls)
	}
	err := do(ctx)
	if answered(err) {
		return err
	}
	select {
	case <-time.After(retryPause):
		return do(ctx)
	case <-ctx.Done():
		return err
	}
}

// Available returns why the service cannot be used, or nil. It does not wait:
// if there is a reason, it has another look taken, at most once a second.
func (m *manager) Available() error {
	m.mu.Lock()
	failure, again := m.failure, m.again
	m.mu.Unlock()
	if failure == nil || m.admit() != nil {
		return failure
	}
	m.probes.Go(func() { _ = m.settle(m.ask(callTime, again), again) })
	return failure
}

// ValidateName reports whether a key may have that name.
func (m *manager) ValidateName(name string) error { return checkRemoteName(name) }

// CreateKey makes a key in the service, which it cannot leave. It fails with an
// [apiv1.AlreadyExistsError] if there is one of that name. A key that does not
// prove to be of its public half is deleted again.
func (m *manager) CreateKey(req *apiv1.CreateKeyRequest) (*apiv1.CreateKeyResponse, error) {
	if err := checkRemoteName(req.Name); err != nil {
		return nil, err
	}
	t, err := typeOf(req)
	if err != nil {
		return nil, err
	}
	if _, err := m.open(req.Name); err == nil {
		return nil, apiv1.AlreadyExistsError{Message: fmt.Sprintf("key %q exists", req.Name)}
	} else if !errors.Is(err, apiv1.NotFoundError{}) {
		return nil, err
	}
	// Not tried twice: the first may have made one, although it failed.
	ctx, cancel := context.WithTimeout(m.ctx, callTime)
	defer cancel()
	if err := m.svc.create(ctx, req.Name, t); err != nil {
		if !answered(err) {
			err = fmt.Errorf("%w: %s: %w", ErrUnavailable, m.what, err)
		}
		return nil, err
	}
	s, err := m.prove(req.Name, t)
	if err != nil {
		return nil, errors.Join(err, m.DeleteKey(&apiv1.DeleteKeyRequest{Name: req.Name}))
	}
	return &apiv1.CreateKeyResponse{
		Name:                req.Name,
		PublicKey:           s.public,
		CreateSignerRequest: apiv1.CreateSignerRequest{SigningKey: req.Name},
	}, nil
}

// prove has a new key sign something.
func (m *manager) prove(name string, t keyType) (*signer, error) {
	s, err := m.open(name)
	if err != nil {
		return nil, err
	}
	if s.kind != t {
		return nil, fmt.Errorf("%w: %s: it made a key of type %s when asked for %s", ErrUnavailable, m.what, s.kind, t)
	}
	digest := make([]byte, t.hash().Size())
	rand.Read(digest) // never fails
	_, err = s.Sign(nil, digest, t.hash())
	return s, err
}

// GetPublicKey returns the public half of a key. It fails with an
// [apiv1.NotFoundError] if there is none of that name.
func (m *manager) GetPublicKey(req *apiv1.GetPublicKeyRequest) (crypto.PublicKey, error) {
	s, err := m.open(req.Name)
	if err != nil {
		return nil, err
	}
	return s.public, nil
}

// CreateSigner returns the key named by the request's SigningKey. It fails with
// an [apiv1.NotFoundError] if there is none of that name.
func (m *manager) CreateSigner(req *apiv1.CreateSignerRequest) (crypto.Signer, error) {
	s, err := m.open(req.SigningKey)
	if err != nil {
		return nil, err
	}
	return s, nil
}

func (m *manager) open(name string) (*signer, error) {
	if err := checkRemoteName(name); err != nil {
		return nil, err
	}
	s := &signer{manager: m}
	err := m.need(func(ctx context.Context) error {
		f, err := m.svc.find(ctx, name)
		if err != nil {
			return err
		}
		s.found = f
		s.kind, err = typeOfPublic(f.public)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open key %q: %w", name, err)
	}
	return s, nil
}

// DeleteKey deletes a key, or has the service do it in some days where that is
// all it does; from then on the key signs no more. It fails with an
// [apiv1.NotFoundError] if there is none of that name.
func (m *manager) DeleteKey(req *apiv1.DeleteKeyRequest) error {
	if err := checkRemoteName(req.Name); err != nil {
		return err
	}
	return m.want(callTime, func(ctx context.Context) error { return m.svc.remove(ctx, req.Name) })
}

// Keys returns the keys of this server, at most a thousand, in any order.
func (m *manager) Keys() (keys []Key, err error) {
	err = m.want(listTime, func(ctx context.Context) error {
		keys, err = m.svc.list(ctx)
		return err
	})
	return keys, err
}

// Close ends what is being asked.
func (m *manager) Close() error {
	m.mu.Lock()
	m.cancel()
	m.mu.Unlock()
	m.probes.Wait()
	return nil
}

// signer signs with a key in a service. What the service returns is verified.
type signer struct {
	*found
	manager *manager
	kind    keyType
}

func (s *signer) Public() crypto.PublicKey { return s.public }

// Sign signs a digest of SHA-256, or of SHA-384 with a key on P-384; other
// hashes services do not sign.
func (s *signer) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) (signature []byte, err error) {
	hash := s.kind.hash()
	if _, pss := opts.(*rsa.PSSOptions); pss || opts.HashFunc() != hash || len(digest) != hash.Size() {
		return nil, fmt.Errorf("a key of type %s in %s signs digests of %s, and nothing else", s.kind, s.manager.what, hash)
	}
	err = s.manager.need(func(ctx context.Context) error {
		got, err := s.sign(ctx, digest)
		if err == nil {
			err = verify(s.public, hash, digest, got)
		}
		if err == nil {
			signature = got
		}
		return err
	})
	return signature, err
}

package held_test

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/agent/held/heldtest"
	"github.com/hallmark-id/hallmark/pkg/bundle"
)

// slow is a signer whose answers arrive late: what happens meanwhile, after
// the signature, is done by late. It is called once.
type slow struct {
	*heldtest.Server
	late func()
}

func (s *slow) arrive() {
	if late := s.late; late != nil {
		s.late = nil
		late()
	}
}

func (s *slow) SignX509(ctx context.Context, requests []held.X509Request) ([]held.X509Result, error) {
	results, err := s.Server.SignX509(ctx, requests)
	s.arrive()
	return results, err
}

func (s *slow) SignWIT(ctx context.Context, requests []held.WITRequest) ([]held.WITResult, error) {
	results, err := s.Server.SignWIT(ctx, requests)
	s.arrive()
	return results, err
}

func (s *slow) SignJWT(ctx context.Context, entryID string, audience []string) (held.JWTResult, error) {
	result, err := s.Server.SignJWT(ctx, entryID, audience)
	s.arrive()
	return result, err
}

// onSlowNode runs body on a node with one entry; late happens while the first
// answer of the server is on its way.
func onSlowNode(t *testing.T, late, body func(n *node, arm func())) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		server := heldtest.New(t)
		server.Entry("a", noPrefetch, "unix:uid:1")
		signer := &slow{Server: server}
		h := held.New(held.Options{TrustDomain: heldtest.TrustDomain, Signer: signer})
		n := &node{h, server, t}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- h.Run(ctx) }()
		n.sync()
		body(n, func() { signer.late = func() { late(n, nil) } })
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run returned %v", err)
		}
	})
}

// publish tells the node of the server's bundle.
func (n *node) publish() {
	n.Apply(held.Change{Bundles: []*bundle.Bundle{n.Server.Bundle()}})
}

// distrust are the ways in which an authority that signed falls into disgrace.
var distrust = map[string]func(n *node, _ func()){
	"tainted": func(n *node, _ func()) { n.Rotate(); n.Taint(); n.publish() },
	"revoked": func(n *node, _ func()) { n.Rotate(); n.Revoke(); n.publish() },
}

func TestAnX509SVIDWhoseAuthorityFellWhileItWasUnderWayIsReplaced(t *testing.T) {
	for name, late := range distrust {
		t.Run(name, func(t *testing.T) {
			onSlowNode(t, late, func(n *node, arm func()) {
				arm()
				s := n.subscribe("unix:uid:1")
				time.Sleep(time.Second)
				n.verify(svid(s.Update()), "a")
				want(t, "calls", len(n.X509Calls()), 2)
				if chains := chainsTo(t, svid(s.Update()), n.Server.Bundle(), true); chains == 0 {
					t.Error("what is held is signed by an authority that is not trusted")
				}
			})
		})
	}
}

func TestAJWTSVIDWhoseKeyFellWhileItWasUnderWayIsNeitherServedNorKept(t *testing.T) {
	for name, late := range distrust {
		t.Run(name, func(t *testing.T) {
			onSlowNode(t, late, func(n *node, arm func()) {
				arm()
				token := n.jwt("x")
				want(t, "signed", len(n.JWTCalls()), 2)
				want(t, "asked again", n.jwt("x"), token)
				want(t, "signed", len(n.JWTCalls()), 2)
			})
		})
	}
}

// chainsTo counts the chains from an X509-SVID to a bundle's authorities, of
// which the tainted ones count only if they are to.
func chainsTo(t *testing.T, svid *held.X509SVID, b *bundle.Bundle, untainted bool) int {
	t.Helper()
	certs, err := x509.ParseCertificates(svid.Chain)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	for _, a := range b.X509Authorities {
		if !untainted || !a.Tainted {
			pool.AddCert(a.Certificate)
		}
	}
	chains, _ := certs[0].Verify(x509.VerifyOptions{Roots: pool, CurrentTime: time.Now()})
	return len(chains)
}

func TestWhatAWorkloadHasVerifiesAtEachStepOfATaintAndRevocation_T25(t *testing.T) {
	onNode(t, 0, func(n *node) {
		for i := range 20 {
			n.Entry(fmt.Sprint("e", i), nil, "unix:uid:1")
		}
		n.sync()
		s := n.subscribe("unix:uid:1")
		step := func(what string, revoked int) {
			t.Helper()
			synctest.Wait()
			woken(s)
			u := s.Update()
			want(t, what+": authorities in the bundle", len(u.Bundle.X509Authorities), 2-revoked)
			for _, i := range u.Identities {
				if i.SVID == nil || chainsTo(t, i.SVID, u.Bundle, false) == 0 {
					t.Errorf("%s: %s does not verify", what, i.Entry.ID)
				}
			}
		}
		began := time.Now()
		n.Rotate()
		n.publish()
		step("another authority is there", 0)
		n.Taint()
		n.publish()
		step("the old one is tainted", 0)
		for _, i := range s.Update().Identities {
			if chainsTo(t, i.SVID, n.Server.Bundle(), true) == 0 {
				t.Errorf("%s was not replaced", i.Entry.ID)
			}
		}
		calls := len(n.X509Calls())
		n.Revoke()
		n.publish()
		step("the old one is revoked", 1)
		want(t, "calls after the revocation", len(n.X509Calls())-calls, 0)
		want(t, "time that passed", time.Since(began), 0)
	})
}

func TestAnX509SVIDOfAnotherAuthorityStaysWhenOneFalls(t *testing.T) {
	onNode(t, 0, func(n *node) {
		n.Rotate() // the second authority signs
		n.Entry("a", nil, "unix:uid:1")
		n.sync()
		s := n.subscribe("unix:uid:1")
		first := svid(s.Update())
		n.Taint()
		n.publish()
		n.Revoke()
		n.publish()
		synctest.Wait()
		if svid(s.Update()) != first {
			t.Error("it was replaced")
		}
	})
}

func TestAnX509SVIDWhoseAuthorityIsTrustedAgainIsLeftAlone(t *testing.T) {
	onNode(t, 0, func(n *node) {
		n.Entry("a", nil, "unix:uid:1")
		n.sync()
		s := n.subscribe("unix:uid:1")
		before := n.Server.Bundle()
		n.Down(errors.New("no connection"))
		n.Taint()
		n.publish()
		synctest.Wait()
		calls := len(n.X509Calls())
		if calls < 2 {
			t.Fatal("it was not asked for again")
		}
		before.SequenceNumber = 99 // as after the state was restored
		n.Apply(held.Change{Bundles: []*bundle.Bundle{before}})
		n.Down(nil)
		time.Sleep(10 * time.Minute)
		want(t, "calls", len(n.X509Calls()), calls)
		n.verify(svid(s.Update()), "a")
	})
}

package held_test

import (
	"bytes"
	"math/big"
	"testing"
	"testing/synctest"

	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/pkg/digest"
)

// TestARevokedX509SVIDIsReplacedAtOnceAndEveryStreamIsTold gives a node CRLs.
func TestARevokedX509SVIDIsReplacedAtOnceAndEveryStreamIsTold(t *testing.T) {
	onNode(t, 0, func(n *node) {
		n.Entry("a", nil, "unix:uid:1")
		n.Entry("b", nil, "unix:uid:2")
		n.sync()
		a, b := n.subscribe("unix:uid:1"), n.subscribe("unix:uid:2")
		bundles := n.SubscribeBundles(b.Update().Entries[0].Selectors)
		defer bundles.Close()
		old, kept := n.verify(svid(a.Update()), "a"), svid(b.Update())
		drain := func(c <-chan struct{}) (told bool) {
			select {
			case <-c:
				return true
			default:
				return false
			}
		}
		drain(a.C)
		drain(b.C)
		drain(bundles.C)

		id, der := n.CRL(1, old.SerialNumber, big.NewInt(12345))
		crl, err := held.NewCRL(id, 1, der)
		if err != nil {
			t.Fatal(err)
		}
		before := digest.Sum(n.Digest())
		n.Apply(held.Change{Revision: 100, CRLs: []*held.CRL{crl}})
		before.AddCRL(id, 1)
		if !bytes.Equal(n.Digest(), before[:]) {
			t.Error("the digest lacks the CRL")
		}
		synctest.Wait()
		if !drain(a.C) || !drain(b.C) || !drain(bundles.C) {
			t.Error("a stream is not told of a CRL")
		}
		for _, s := range []*held.Subscription{a, b, bundles} {
			if got := s.Update().CRLs; len(got) != 1 || !bytes.Equal(got[0], der) {
				t.Errorf("an update has %d CRLs", len(got))
			}
		}
		fresh := n.verify(svid(a.Update()), "a")
		if fresh.SerialNumber.Cmp(old.SerialNumber) == 0 || bytes.Equal(fresh.RawSubjectPublicKeyInfo, old.RawSubjectPublicKeyInfo) {
			t.Error("what was revoked is not replaced, or by the same key")
		}
		if svid(b.Update()) != kept {
			t.Error("what was not revoked is replaced")
		}
		n.Apply(held.Change{Revision: 101, GoneCRLs: []string{id}})
		if got := a.Update().CRLs; len(got) != 0 {
			t.Errorf("after it is gone there are %d CRLs", len(got))
		}
	})
}

func TestACRLThatCannotBeReadIsNotPassedOn(t *testing.T) {
	onNode(t, 0, func(n *node) {
		n.Entry("a", nil, "unix:uid:1")
		n.sync()
		a := n.subscribe("unix:uid:1")
		crl, err := held.NewCRL("00", 1, []byte("garbage"))
		if err == nil {
			t.Error("garbage is a CRL")
		}
		before := digest.Sum(n.Digest())
		n.Apply(held.Change{Revision: 100, CRLs: []*held.CRL{crl}})
		before.AddCRL("00", 1) // which the server counts
		if !bytes.Equal(n.Digest(), before[:]) || len(a.Update().CRLs) != 0 {
			t.Error("it does not count in the digest, or is passed on")
		}
	})
}

package feed_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"testing"
	"time"

	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/server/feed"
	"github.com/hallmark-id/hallmark/server/registry"
)

// crls writes CRLs of an authority into a world's registry.
type crls struct {
	*world
	key    *ecdsa.PrivateKey
	number int64
}

func (c *crls) put(serials ...int64) {
	c.t.Helper()
	c.number++
	list := &x509.RevocationList{Number: big.NewInt(c.number), ThisUpdate: time.Now(), NextUpdate: time.Now().Add(time.Hour)}
	crl := &registry.CRL{AuthorityID: "aa"}
	for _, n := range serials {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: big.NewInt(n), RevocationTime: time.Now()})
		crl.Revoked = append(crl.Revoked, registry.RevokedCertificate{EndsAt: time.Now().Add(time.Hour)})
	}
	issuer := &x509.Certificate{Subject: pkix.Name{CommonName: "a"}, SubjectKeyId: []byte{0xaa}, KeyUsage: x509.KeyUsageCRLSign}
	var err error
	crl.DER, err = x509.CreateRevocationList(rand.Reader, list, issuer, c.key)
	must(c.t, err)
	must(c.t, c.registry.PutCRL(c.t.Context(), c.registry.View().CRL("aa"), crl))
}

// TestCRLsThatRevokeAnythingAreSentToAgentsThatTakeThem has one agent that does
// not, as older ones.
func TestCRLsThatRevokeAnythingAreSentToAgentsThatTakeThem(t *testing.T) {
	w := newWorld(t)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	c := &crls{world: w, key: key}
	older := w.agent("older")
	taker := w.newAgent(w.node("taker"))
	taker.open(w)
	taker.toServ <- &hallmarkv1.FollowRequest{TakesCrls: true}
	taker.next(0)

	c.put() // revokes nothing
	w.inStep()
	if n := taker.count(); n != 1 {
		t.Errorf("of a CRL that revokes nothing it was sent %d messages", n-1)
	}
	c.put(7)
	w.inStep()
	last := taker.next(1)[1]
	if len(last.Crls) != 1 || last.Crls[0].AuthorityId != "aa" || last.Crls[0].Number != 2 || len(last.Crls[0].Der) == 0 {
		t.Errorf("it was sent %v", last)
	}
	c.put()
	w.inStep()
	if last := taker.next(2)[2]; len(last.GoneCrls) != 1 || len(last.Crls) != 0 {
		t.Errorf("once nothing is revoked it was sent %v", last)
	}
	if n := older.count(); n != 1 {
		t.Errorf("one that takes none was sent %v", older.next(0)[1:])
	}
	must(t, older.disconnect())
	must(t, taker.disconnect())
}

// TestAnAgentIsToldOfTheCRLsWhenItsOwnSVIDIsInOne ends its stream.
func TestAnAgentIsToldOfTheCRLsWhenItsOwnSVIDIsInOne(t *testing.T) {
	w := newWorld(t)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	c := &crls{world: w, key: key}
	a := w.newAgent(w.node("a"))
	a.verify = func(v *registry.View) error {
		if v.CRL("aa").Has([]byte{7}) {
			return errors.New("it was revoked")
		}
		return nil
	}
	a.open(w)
	a.toServ <- &hallmarkv1.FollowRequest{TakesCrls: true}
	a.next(0)
	c.put(7)
	if err := a.wait(); !errors.Is(err, feed.ErrUntrusted) {
		t.Errorf("the stream ended with %v", err)
	}
	if last := a.next(1)[1]; len(last.Crls) != 1 {
		t.Errorf("at last it was sent %v", last)
	}
}

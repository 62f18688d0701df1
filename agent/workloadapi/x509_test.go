package workloadapi_test

import (
	"bytes"
	"crypto/x509"
	"errors"
	"slices"
	"testing"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/agent/held/heldtest"
	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/entry"
)

func TestWorkloadAPI_A15_To_A21_AMessageIsComplete(t *testing.T) {
	a := start(t)
	other := spiffeid.RequireTrustDomainFromString("other.org")
	a.Entry("b", func(e *entry.Entry) { e.Hint = "same"; e.FederatesWith = []spiffeid.TrustDomain{other} }, "unix:uid:1")
	a.Entry("a", func(e *entry.Entry) { e.Hint = "same" }, "unix:uid:1")
	a.Entry("c", func(e *entry.Entry) { e.Hint = "other" }, "unix:uid:1")
	a.Entry("not-mine", nil, "unix:uid:2")
	foreign := a.ForeignBundle("other.org")
	a.sync(foreign, a.ForeignBundle("unrelated.org"))
	first := recv(t, a.x509())
	wantIDs(t, first, "b", "c")
	a.verifyX509(first)
	if len(first.FederatedBundles) != 1 || !bytes.Equal(first.FederatedBundles["spiffe://other.org"], foreign.DER()) {
		t.Errorf("federated bundles are %v", first.FederatedBundles)
	}
	if _, err := x509.ParseCertificates(first.FederatedBundles["spiffe://other.org"]); err != nil {
		t.Error(err)
	}
	again := recv(t, a.x509())
	if !proto.Equal(first, again) {
		t.Error("two calls got different messages")
	}
}

func TestWorkloadAPI_A07_TheFirstMessageWaitsForAllThatIsBeingSigned(t *testing.T) {
	a := start(t)
	a.Entry("a", nil, "unix:uid:1")
	a.Entry("broken", nil, "unix:uid:1")
	a.Break("broken", errors.New("no such key type"))
	a.sync()
	wantIDs(t, recv(t, a.x509()), "a")
	a.Entry("b", func(e *entry.Entry) { e.DisableX509Prefetch = true }, "unix:uid:1")
	release := a.Hold()
	a.sync()
	s := a.x509()
	<-a.Waiting() // the stream has asked for b
	release()
	wantIDs(t, recv(t, s), "a", "b")
}

func TestWorkloadAPI_A06_A24_EachChangeIsSentAtOnce(t *testing.T) {
	a := start(t)
	other := spiffeid.RequireTrustDomainFromString("other.org")
	first := a.Entry("first", func(e *entry.Entry) { e.FederatesWith = []spiffeid.TrustDomain{other} }, "unix:uid:1")
	a.sync()
	s := a.x509()
	m := recv(t, s)
	wantIDs(t, m, "first")

	second := a.Entry("second", nil, "unix:uid:1")
	a.sync()
	m = recv(t, s)
	wantIDs(t, m, "first", "second") // a new entry
	a.verifyX509(m)

	foreign := a.ForeignBundle("other.org")
	a.sync(foreign)
	if m = recv(t, s); len(m.FederatedBundles) != 1 {
		t.Error("the federated bundle is not there")
	}
	a.Rotate()
	a.sync(foreign)
	before := m
	if m = recv(t, s); bytes.Equal(m.Svids[0].Bundle, before.Svids[0].Bundle) || !bytes.Equal(m.Svids[0].X509Svid, before.Svids[0].X509Svid) {
		t.Error("the own bundle did not change, or the X509-SVID did")
	}
	first = a.Update(first, func(e *entry.Entry) { e.DNSNames = []string{"web.example.org"} })
	a.sync(foreign)
	for before = m; bytes.Equal(m.Svids[0].X509Svid, before.Svids[0].X509Svid); m = recv(t, s) {
	}
	a.verifyX509(m)
	a.Delete(first)
	a.sync()
	m = recv(t, s)
	wantIDs(t, m, "second") // an entry that is gone, and its bundles
	if len(m.FederatedBundles) != 0 {
		t.Error("the federated bundle is still there")
	}
	a.Delete(second)
	a.sync()
	_, err := s.Recv()
	wantCode(t, err, codes.PermissionDenied)
}

func TestWorkloadAPI_A24_AnOnlyIdentityThatIsRenamedIsReplaced(t *testing.T) {
	a := start(t)
	e := a.Entry("old", nil, "unix:uid:1")
	a.sync()
	s := a.x509()
	wantIDs(t, recv(t, s), "old")
	a.Update(e, func(e *entry.Entry) { e.SPIFFEID = spiffeid.RequireFromPath(heldtest.TrustDomain, "/new") })
	a.sync()
	wantIDs(t, recv(t, s), "new")
}

func TestAStreamWhoseOnlyIdentityCannotBeSignedAnyMoreEnds(t *testing.T) {
	a := start(t)
	e := a.Entry("old", nil, "unix:uid:1")
	a.sync()
	s := a.x509()
	wantIDs(t, recv(t, s), "old")
	a.Break("old", errors.New("refused"))
	a.Update(e, func(e *entry.Entry) { e.SPIFFEID = spiffeid.RequireFromPath(heldtest.TrustDomain, "/new") })
	a.sync()
	_, err := s.Recv()
	wantCode(t, err, codes.Unavailable)
}

func TestWithoutTheServerWhatIsHeldIsServed(t *testing.T) {
	a := start(t)
	a.Entry("web", nil, "unix:uid:1")
	a.sync()
	recv(t, a.x509())
	a.Down(errors.New("away"))
	wantIDs(t, recv(t, a.x509()), "web")
}

func TestNothingIsSentTwice(t *testing.T) {
	a := start(t)
	a.Entry("mine", nil, "unix:uid:1")
	a.sync()
	s := a.x509()
	recv(t, s)
	a.Entry("not-mine", nil, "unix:uid:2")
	a.sync()
	a.sync()
	a.Entry("mine-too", nil, "unix:uid:1")
	a.sync()
	wantIDs(t, recv(t, s), "mine", "mine-too")
}

func TestWorkloadAPI_A25_BundlesAreThoseTheWorkloadMaySee(t *testing.T) {
	a := start(t)
	other := spiffeid.RequireTrustDomainFromString("other.org")
	a.Entry("web", func(e *entry.Entry) { e.FederatesWith = []spiffeid.TrustDomain{other} }, "unix:uid:1")
	foreign := a.ForeignBundle("other.org")
	a.sync(foreign, a.ForeignBundle("unrelated.org"))
	s, err := a.client.FetchX509Bundles(a.call(), &workload.X509BundlesRequest{})
	must(t, err)
	m := recv(t, s)
	if len(m.Bundles) != 2 || !bytes.Equal(m.Bundles["spiffe://example.org"], a.Bundle().DER()) || !bytes.Equal(m.Bundles["spiffe://other.org"], foreign.DER()) {
		t.Errorf("bundles are %v", m.Bundles)
	}
	a.held.Apply(held.Change{GoneBundles: []spiffeid.TrustDomain{other}})
	if m = recv(t, s); len(m.Bundles) != 1 {
		t.Error("the federated bundle is still there")
	}
	a.Rotate()
	a.held.Apply(held.Change{Bundles: []*bundle.Bundle{a.Bundle()}})
	if m = recv(t, s); !bytes.Equal(m.Bundles["spiffe://example.org"], a.Bundle().DER()) {
		t.Error("the own bundle is not the new one")
	}
	a.held.Apply(held.Change{GoneEntries: []string{"web"}})
	_, err = s.Recv()
	wantCode(t, err, codes.PermissionDenied)
}

func TestWorkloadAPI_A39_TheOrderIsThatOfCreation(t *testing.T) {
	a := start(t)
	want := []string{"z", "m", "a", "q", "0"}
	for _, id := range want {
		a.Entry(id, nil, "unix:uid:1")
	}
	for range 5 {
		a.sync()
		if got := idsOf(recv(t, a.x509())); !slices.Equal(got, want) {
			t.Errorf("got %v", got)
		}
	}
}

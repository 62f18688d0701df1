package broker_test

import (
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	brokerpb "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/hallmark-id/hallmark/agent/broker"
	"github.com/hallmark-id/hallmark/agent/held/heldtest"
	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/jwtsvid"
)

var other = spiffeid.RequireTrustDomainFromString("other.org")

func TestBrokerAPI_BA06_BA08_BA09_BA12_BA31_BA34_BA35_References(t *testing.T) {
	a := start(t)
	ended := exec.Command("true")
	must(t, ended.Run())
	alone, _ := process(t)
	self := packed(t, &brokerpb.WorkloadPIDReference{Pid: int32(os.Getpid())})
	for name, c := range map[string]struct {
		reference *brokerpb.WorkloadReference
		code      codes.Code
		reason    string
	}{
		"none":                       {nil, codes.InvalidArgument, "WORKLOAD_REFERENCE_INVALID"},
		"an empty one":               {&brokerpb.WorkloadReference{}, codes.InvalidArgument, "WORKLOAD_REFERENCE_INVALID"},
		"one without a type":         {&brokerpb.WorkloadReference{Reference: &anypb.Any{Value: self.Reference.Value}}, codes.InvalidArgument, "WORKLOAD_REFERENCE_INVALID"},
		"one of an unknown type":     {packed(t, &workload.X509SVIDRequest{}), codes.InvalidArgument, "WORKLOAD_REFERENCE_INVALID"},
		"one of a made-up type":      {&brokerpb.WorkloadReference{Reference: &anypb.Any{TypeUrl: "type.googleapis.com/x.y.Z", Value: self.Reference.Value}}, codes.InvalidArgument, "WORKLOAD_REFERENCE_INVALID"},
		"one that is not understood": {&brokerpb.WorkloadReference{Reference: &anypb.Any{TypeUrl: self.Reference.TypeUrl, Value: []byte{0xff}}}, codes.InvalidArgument, "WORKLOAD_REFERENCE_INVALID"},
		"no PID":                     {pidReference(t, 0), codes.InvalidArgument, "WORKLOAD_REFERENCE_INVALID"},
		"a negative PID":             {pidReference(t, -1), codes.InvalidArgument, "WORKLOAD_REFERENCE_INVALID"},
		"an ended process":           {pidReference(t, int32(ended.Process.Pid)), codes.NotFound, "WORKLOAD_NOT_FOUND"},
		"a PID that none has":        {pidReference(t, 1<<31-1), codes.NotFound, "WORKLOAD_NOT_FOUND"},
		"a process without an entry": {pidReference(t, alone), codes.PermissionDenied, "WORKLOAD_NOT_ENTITLED"},
	} {
		for method, call := range calls(a.api, c.reference) {
			wantReason(t, name+", "+method, call(a.call()), c.code, c.reason)
		}
	}
	for name, err := range map[string]error{
		"no audience":       second(a.api.FetchJWTSVID(a.call(), &brokerpb.FetchJWTSVIDRequest{Reference: self})),
		"an empty audience": second(a.api.FetchJWTSVID(a.call(), &brokerpb.FetchJWTSVIDRequest{Reference: self, Audience: []string{""}})),
		"no SPIFFE ID":      second(a.api.FetchJWTSVID(a.call(), &brokerpb.FetchJWTSVIDRequest{Reference: self, Audience: []string{"x"}, SpiffeId: "x"})),
	} {
		wantCode(t, name, err, codes.InvalidArgument)
	}
}

func second[T any](_ T, err error) error { return err }

func TestBrokerAPI_BA05_BA14_To_BA18_ReferencesToKubernetesObjectsAreRefused(t *testing.T) {
	a := start(t)
	pods := &brokerpb.KubernetesObjectType{Plural: "pods", Group: "core"}
	for name, r := range map[string]*brokerpb.KubernetesObjectReference{
		"by key":         {Type: pods, Key: &brokerpb.KubernetesObjectKey{Namespace: "shop", Name: "web"}},
		"by UID":         {Type: pods, Uid: "a1b2c3d4-e5f6-7890-abcd-ef1234567890"},
		"by both":        {Type: pods, Key: &brokerpb.KubernetesObjectKey{Namespace: "shop", Name: "web"}, Uid: "a1b2c3d4-e5f6-7890-abcd-ef1234567890"},
		"by neither":     {Type: pods},
		"without a type": {Uid: "a1b2c3d4-e5f6-7890-abcd-ef1234567890"},
	} {
		for method, call := range calls(a.api, packed(t, r)) {
			wantReason(t, name+", "+method, call(a.call()), codes.InvalidArgument, "WORKLOAD_REFERENCE_INVALID")
		}
	}
}

func TestBrokerAPI_BA03_BA10_BA11_WhatAWorkloadIsComesFromTheKernelAlone(t *testing.T) {
	a := start(t)
	pid, _ := process(t)
	neighbour, _ := process(t)
	a.Entry("web", nil, pidSelector(pid))
	a.Entry("neighbour", nil, pidSelector(neighbour))
	a.sync()
	// A reference with more in it than the standard's: claims of the client.
	r := pidReference(t, pid)
	r.Reference.Value = append(r.Reference.Value, 0x12, 0x05, 'a', 'd', 'm', 'i', 'n')
	s, err := a.api.SubscribeToX509SVID(a.call(), &brokerpb.SubscribeToX509SVIDRequest{Reference: r})
	must(t, err)
	if got := idsOf(recv(t, s)); !slices.Equal(got, []string{"web"}) {
		t.Errorf("got %v", got)
	}
}

func TestBrokerAPI_BA26_To_BA30_EachMessageIsAllThereIsOfOneWorkload(t *testing.T) {
	a := start(t)
	pid, _ := process(t)
	neighbour, _ := process(t)
	web := a.Entry("web", func(e *entry.Entry) { e.FederatesWith = []spiffeid.TrustDomain{other} }, pidSelector(pid))
	a.Entry("neighbour", nil, pidSelector(neighbour))
	a.sync(a.ForeignBundle("other.org"))
	s, t2 := a.follow(pid), a.follow(neighbour)
	m := recv(t, s)
	if got := idsOf(m); !slices.Equal(got, []string{"web"}) || len(m.FederatedBundles) != 1 {
		t.Errorf("at first: %v, %d federated bundles", got, len(m.FederatedBundles))
	}
	if n := recv(t, t2); !slices.Equal(idsOf(n), []string{"neighbour"}) || len(n.FederatedBundles) != 0 {
		t.Errorf("the neighbour has %v, %d federated bundles", idsOf(n), len(n.FederatedBundles))
	}
	a.Entry("web2", nil, pidSelector(pid))
	a.Update(web, func(e *entry.Entry) { e.FederatesWith = nil })
	a.sync()
	for !slices.Equal(idsOf(m), []string{"web", "web2"}) || len(m.FederatedBundles) != 0 { // what is redacted is not there
		m = recv(t, s)
	}
	a.Delete(web)
	a.sync()
	for !slices.Equal(idsOf(m), []string{"web2"}) {
		m = recv(t, s)
	}
}

func TestBrokerAPI_BA25_OneCallsEndLeavesTheConnection(t *testing.T) {
	a := start(t)
	first, end := process(t)
	second, _ := process(t)
	a.Entry("web", nil, pidSelector(first))
	a.Entry("db", nil, pidSelector(second))
	a.sync()
	s, other := a.follow(first), a.follow(second)
	recv(t, s)
	recv(t, other)
	end()
	_, err := s.Recv()
	wantCode(t, "the first", err, codes.NotFound)
	a.Entry("db2", nil, pidSelector(second))
	a.sync()
	if got := idsOf(recv(t, other)); !slices.Equal(got, []string{"db", "db2"}) {
		t.Errorf("the second got %v", got)
	}
}

func TestBrokerAPI_BA37_AStreamEndsWithItsWorkload(t *testing.T) {
	a := start(t)
	pid, end := process(t)
	a.Entry("web", nil, pidSelector(pid))
	a.sync()
	svids := a.follow(pid)
	recv(t, svids)
	x, err := a.api.SubscribeToX509Bundles(a.call(), &brokerpb.SubscribeToX509BundlesRequest{Reference: pidReference(t, pid)})
	must(t, err)
	recv(t, x)
	j, err := a.api.SubscribeToJWTBundles(a.call(), &brokerpb.SubscribeToJWTBundlesRequest{Reference: pidReference(t, pid)})
	must(t, err)
	recv(t, j)
	end()
	a.Entry("web2", nil, pidSelector(pid)) // for whoever gets the PID next: it must not be sent
	a.sync(a.ForeignBundle("other.org"))
	_, err = svids.Recv()
	wantReason(t, "X509-SVIDs", err, codes.NotFound, "WORKLOAD_NOT_FOUND")
	_, err = x.Recv()
	wantReason(t, "X.509 bundles", err, codes.NotFound, "WORKLOAD_NOT_FOUND")
	_, err = j.Recv()
	wantReason(t, "JWT bundles", err, codes.NotFound, "WORKLOAD_NOT_FOUND")
}

func TestAJWTSVIDOfAWorkloadThatEndsMeanwhileIsNotGivenOut(t *testing.T) {
	a := start(t)
	pid, end := process(t)
	a.Entry("web", nil, pidSelector(pid))
	a.sync()
	release := a.Hold()
	defer release()
	got := make(chan error, 1)
	go func() {
		_, err := a.api.FetchJWTSVID(a.call(), &brokerpb.FetchJWTSVIDRequest{Reference: pidReference(t, pid), Audience: []string{"db"}})
		got <- err
	}()
	<-a.Waiting()
	end()
	wantReason(t, "the call", <-got, codes.NotFound, "WORKLOAD_NOT_FOUND")
}

func TestBrokerAPI_BA39_AMessageIsComplete(t *testing.T) {
	a := start(t)
	pid, _ := process(t)
	a.Entry("web", func(e *entry.Entry) { e.Hint = "x"; e.FederatesWith = []spiffeid.TrustDomain{other} }, pidSelector(pid))
	a.Entry("same-hint", func(e *entry.Entry) { e.Hint = "x" }, pidSelector(pid))
	a.Entry("without", nil, pidSelector(pid))
	a.sync(a.ForeignBundle("other.org"))
	m := recv(t, a.follow(pid))
	if got := idsOf(m); !slices.Equal(got, []string{"web", "without"}) {
		t.Fatalf("got %v", got)
	}
	for _, s := range m.Svids {
		certs := certificates(t, s.X509Svid)
		key, err := x509.ParsePKCS8PrivateKey(s.X509SvidKey)
		must(t, err)
		pool := x509.NewCertPool()
		for _, root := range certificates(t, s.Bundle) {
			pool.AddCert(root)
		}
		if _, err := certs[0].Verify(x509.VerifyOptions{Roots: pool}); err != nil {
			t.Error(err)
		}
		if !key.(*ecdsa.PrivateKey).PublicKey.Equal(certs[0].PublicKey) || certs[0].URIs[0].String() != s.SpiffeId {
			t.Errorf("%s: key, certificate and ID do not belong together", s.SpiffeId)
		}
	}
	certificates(t, m.FederatedBundles["spiffe://other.org"])
}

func TestBrokerAPI_BA40_BA44_BundlesAreThoseTheWorkloadMaySee(t *testing.T) {
	a := start(t)
	pid, _ := process(t)
	alone, _ := process(t)
	a.Entry("web", func(e *entry.Entry) { e.FederatesWith = []spiffeid.TrustDomain{other} }, pidSelector(pid))
	a.Entry("alone", nil, pidSelector(alone))
	a.sync(a.ForeignBundle("other.org"))
	for workload, want := range map[int32][]string{
		pid:   {"spiffe://example.org", "spiffe://other.org"},
		alone: {"spiffe://example.org"},
	} {
		x, err := a.api.SubscribeToX509Bundles(a.call(), &brokerpb.SubscribeToX509BundlesRequest{Reference: pidReference(t, workload)})
		must(t, err)
		bundles := recv(t, x).Bundles
		if got := slices.Sorted(maps.Keys(bundles)); !slices.Equal(got, want) {
			t.Errorf("X.509 bundles of %v, want %v", got, want)
		}
		for _, der := range bundles {
			certificates(t, der)
		}
		j, err := a.api.SubscribeToJWTBundles(a.call(), &brokerpb.SubscribeToJWTBundlesRequest{Reference: pidReference(t, workload)})
		must(t, err)
		bundles = recv(t, j).Bundles
		if got := slices.Sorted(maps.Keys(bundles)); !slices.Equal(got, want) {
			t.Errorf("JWT bundles of %v, want %v", got, want)
		}
		for td, text := range bundles {
			var set struct{ Keys []map[string]any }
			must(t, json.Unmarshal(text, &set))
			for _, key := range set.Keys {
				if _, ok := key["use"]; ok || key["x5c"] != nil {
					t.Errorf("the JWT bundle of %s has a key for other uses: %v", td, key)
				}
			}
		}
	}
}

func TestBrokerAPI_BA43_EachIdentityHasAJWTSVIDForTheAudience(t *testing.T) {
	a := start(t)
	pid, _ := process(t)
	a.Entry("web", nil, pidSelector(pid))
	a.Entry("web2", func(e *entry.Entry) { e.Hint = "x" }, pidSelector(pid))
	a.sync()
	fetch := func(id string) []*brokerpb.JWTSVID {
		m, err := a.api.FetchJWTSVID(a.call(), &brokerpb.FetchJWTSVIDRequest{Reference: pidReference(t, pid), Audience: []string{"db", "cache"}, SpiffeId: id})
		must(t, err)
		return m.Svids
	}
	all := fetch("")
	if len(all) != 2 || all[0].SpiffeId != "spiffe://example.org/web" || all[1].SpiffeId != "spiffe://example.org/web2" || all[1].Hint != "x" {
		t.Errorf("got %v", all)
	}
	for _, s := range all {
		token, err := jwtsvid.Validate(s.Svid, []string{"cache"}, func(td spiffeid.TrustDomain) *bundle.Bundle { return a.held.Bundle(td) }, time.Now())
		must(t, err)
		if token.ID.String() != s.SpiffeId || !slices.Equal(token.Audience, []string{"db", "cache"}) {
			t.Errorf("the token of %s is of %s for %v", s.SpiffeId, token.ID, token.Audience)
		}
	}
	if one := fetch("spiffe://example.org/web2"); len(one) != 1 || one[0].SpiffeId != "spiffe://example.org/web2" {
		t.Errorf("got %v", one)
	}
	_, err := a.api.FetchJWTSVID(a.call(), &brokerpb.FetchJWTSVIDRequest{
		Reference: pidReference(t, pid), Audience: []string{"db"}, SpiffeId: "spiffe://example.org/broker",
	})
	wantReason(t, "another's ID", err, codes.PermissionDenied, "WORKLOAD_NOT_ENTITLED")
}

func TestBrokerAPI_BA21_ABrokerGetsWhatItsPolicyNamesAndNoMore(t *testing.T) {
	a := start(t, func(o *broker.Options) {
		below, err := broker.ParsePattern("spiffe://example.org/shop/*")
		must(t, err)
		exact, err := broker.ParsePattern("spiffe://example.org/db")
		must(t, err)
		o.Policies[0].SPIFFEIDs, o.Policies[0].Audiences = []broker.Pattern{below, exact}, []string{"a", "b"}
	})
	pid, _ := process(t)
	bank, _ := process(t)
	at := func(path string) func(*entry.Entry) {
		return func(e *entry.Entry) {
			e.SPIFFEID, e.Hint = spiffeid.RequireFromPath(heldtest.TrustDomain, path), "same"
		}
	}
	a.Entry("vault", func(e *entry.Entry) { at("/vault")(e); e.FederatesWith = []spiffeid.TrustDomain{other} }, pidSelector(pid))
	a.Entry("shopping", at("/shopping/web"), pidSelector(pid))
	a.Entry("web", at("/shop/web"), pidSelector(pid)) // its hint is taken only among those that it may not have
	a.Entry("db", func(e *entry.Entry) { at("/db")(e); e.Hint = "" }, pidSelector(pid))
	a.Entry("below-db", func(e *entry.Entry) { at("/db/x")(e); e.Hint = "" }, pidSelector(pid))
	a.Entry("operator", func(e *entry.Entry) { at("/shop/operator")(e); e.Admin = true; e.Hint = "" }, pidSelector(pid))
	a.Entry("bank", at("/bank"), pidSelector(bank))
	a.sync(a.ForeignBundle("other.org"))
	m := recv(t, a.follow(pid))
	if got := idsOf(m); !slices.Equal(got, []string{"shop/web", "db"}) || len(m.FederatedBundles) != 0 {
		t.Errorf("got %v, %d federated bundles", got, len(m.FederatedBundles))
	}
	for method, call := range calls(a.api, pidReference(t, bank)) {
		if method != "FetchJWTSVID" {
			wantReason(t, method, call(a.call()), codes.PermissionDenied, "WORKLOAD_NOT_ENTITLED")
		}
	}
	fetch := func(pid int32, id string, audience ...string) error {
		_, err := a.api.FetchJWTSVID(a.call(), &brokerpb.FetchJWTSVIDRequest{Reference: pidReference(t, pid), Audience: audience, SpiffeId: id})
		return err
	}
	must(t, fetch(pid, "", "b", "a"))
	wantCode(t, "an audience that it may not ask for", fetch(pid, "", "a", "c"), codes.PermissionDenied)
	wantReason(t, "an ID that it may not ask for", fetch(pid, "spiffe://example.org/vault", "a"), codes.PermissionDenied, "WORKLOAD_NOT_ENTITLED")
	wantReason(t, "a workload that it may not ask for", fetch(bank, "", "a"), codes.PermissionDenied, "WORKLOAD_NOT_ENTITLED")
}

func TestBrokerAPI_BA45_EachIssuanceIsRecorded(t *testing.T) {
	a := start(t)
	pid, _ := process(t)
	a.Entry("web", nil, pidSelector(pid))
	a.sync()
	s := a.follow(pid)
	recv(t, s)
	a.Entry("web2", nil, pidSelector(pid))
	a.sync()
	recv(t, s)
	_, err := a.api.FetchJWTSVID(a.call(), &brokerpb.FetchJWTSVIDRequest{Reference: pidReference(t, pid), Audience: []string{"db"}, SpiffeId: "spiffe://example.org/web"})
	must(t, err)
	who := fmt.Sprintf("broker=spiffe://example.org/broker workload_pid=%d spiffe_id=spiffe://example.org/", pid)
	for text, want := range map[string]int{
		`msg="X509-SVID issued on behalf of a workload" ` + who + "web entry=web ":              1, // once, though it was sent twice
		`msg="X509-SVID issued on behalf of a workload" ` + who + "web2 entry=web2 ":            1,
		`msg="JWT-SVID issued on behalf of a workload" ` + who + "web entry=web audience=db ":   1,
		`msg="JWT-SVID issued on behalf of a workload" ` + who + "web2 entry=web2 audience=db ": 0,
	} {
		if got := a.log.count(text); got != want {
			t.Errorf("the log has %d times, want %d: %s", got, want, text)
		}
	}
}

func TestPatterns(t *testing.T) {
	for pattern, c := range map[string]struct{ yes, no []string }{
		"spiffe://example.org/shop/*": {[]string{"/shop/web", "/shop/web/x"}, []string{"/shop", "/shopping", "/x/shop/web"}},
		"spiffe://example.org/shop":   {[]string{"/shop"}, []string{"/shop/web", "/shopping"}},
		"spiffe://example.org/*":      {[]string{"/shop", "/a/b"}, nil},
	} {
		p, err := broker.ParsePattern(pattern)
		must(t, err)
		for _, path := range c.yes {
			if !p.Matches(spiffeid.RequireFromPath(heldtest.TrustDomain, path)) {
				t.Errorf("%s is not for %s", pattern, path)
			}
		}
		for _, path := range c.no {
			if p.Matches(spiffeid.RequireFromPath(heldtest.TrustDomain, path)) {
				t.Errorf("%s is for %s", pattern, path)
			}
		}
		if p.Matches(spiffeid.RequireFromPath(spiffeid.RequireTrustDomainFromString("example.organic"), "/shop/web")) {
			t.Errorf("%s is for another trust domain", pattern)
		}
	}
	for _, pattern := range []string{"", "*", "/*", "shop", "spiffe://", "spiffe://example.org", "spiffe://example.org/", "spiffe://example.org/a*", "spiffe://example.org/*/b", "spiffe://example.org//*", "spiffe://example.org/%61/*"} {
		if p, err := broker.ParsePattern(pattern); err == nil {
			t.Errorf("%q is the pattern %v", pattern, p)
		}
	}
	if !strings.Contains(second(broker.ParsePattern("spiffe://example.org")).Error(), "write spiffe://example.org/*") {
		t.Error("a trust domain's error does not say what to write")
	}
}

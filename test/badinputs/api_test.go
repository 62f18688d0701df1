package badinputs

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"net/url"
	"strings"
	"testing"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

// goodEntry would be created if a case did not spoil it.
func goodEntry() *types.Entry {
	return &types.Entry{
		SpiffeId:  &types.SPIFFEID{TrustDomain: "example.org", Path: "/bad"},
		ParentId:  &types.SPIFFEID{TrustDomain: "example.org", Path: "/dev"},
		Selectors: []*types.Selector{{Type: "unix", Value: "uid:1"}},
	}
}

// entries are what spoils an entry, and what the answer for it names.
var entries = map[string]struct {
	spoil func(*types.Entry)
	says  string
}{
	"no SPIFFE ID":            {func(e *types.Entry) { e.SpiffeId = nil }, "SPIFFE ID"},
	"no parent":               {func(e *types.Entry) { e.ParentId = nil }, "parent_id: SPIFFE ID is missing"},
	"no path":                 {func(e *types.Entry) { e.SpiffeId.Path = "" }, "has no path"},
	"foreign trust domain":    {func(e *types.Entry) { e.SpiffeId.TrustDomain = "other.org" }, "example.org"},
	"foreign parent":          {func(e *types.Entry) { e.ParentId.TrustDomain = "other.org" }, "example.org"},
	"reserved path":           {func(e *types.Entry) { e.SpiffeId.Path = "/spire/agent/x" }, "reserved"},
	"no selectors":            {func(e *types.Entry) { e.Selectors = nil }, "selector"},
	"selector without type":   {func(e *types.Entry) { e.Selectors[0].Type = "" }, "selector"},
	"selector with a colon":   {func(e *types.Entry) { e.Selectors[0].Type = "a:b" }, "selector"},
	"selector without value":  {func(e *types.Entry) { e.Selectors[0].Value = "" }, "selector"},
	"lifetime below zero":     {func(e *types.Entry) { e.X509SvidTtl = -1 }, "lifetime"},
	"JWT lifetime below zero": {func(e *types.Entry) { e.JwtSvidTtl = -1 }, "lifetime"},
	"DNS name with space":     {func(e *types.Entry) { e.DnsNames = []string{"a b"} }, "DNS name"},
	"DNS name twice":          {func(e *types.Entry) { e.DnsNames = []string{"a", "A"} }, "DNS name"},
	"too many DNS names":      {func(e *types.Entry) { e.DnsNames = make([]string, 101) }, "DNS names"},
	"long hint":               {func(e *types.Entry) { e.Hint = strings.Repeat("h", 1025) }, "the most is 1024"},
	"long entry ID":           {func(e *types.Entry) { e.Id = strings.Repeat("i", 256) }, "255"},
	"entry ID with a slash":   {func(e *types.Entry) { e.Id = "a/b" }, "entry ID"},
	"federates with itself":   {func(e *types.Entry) { e.FederatesWith = []string{"example.org"} }, "own"},
	"federates with garbage":  {func(e *types.Entry) { e.FederatesWith = []string{"A B"} }, "trust domain"},
	"too many selectors": {func(e *types.Entry) {
		for range 101 {
			e.Selectors = append(e.Selectors, &types.Selector{Type: "a", Value: "b"})
		}
	}, "selectors"},
}

func TestBadEntriesAreExplainedAndNotCreated(t *testing.T) {
	h := newHouse(t)
	before := h.state(t)
	client := entryv1.NewEntryClient(h.server)
	for name, c := range entries {
		t.Run(name, func(t *testing.T) {
			e := goodEntry()
			c.spoil(e)
			resp, err := client.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{e}})
			must(t, err)
			if s := resp.Results[0].Status; s.Code != int32(codes.InvalidArgument) {
				t.Errorf("the status is %v", s)
			} else {
				says(t, s.Message, c.says)
			}
		})
	}
	h.unchanged(t, before)
	h.serves(t)
}

func csr(t testing.TB, key any, uris ...string) []byte {
	t.Helper()
	template := &x509.CertificateRequest{}
	for _, text := range uris {
		u, err := url.Parse(text)
		must(t, err)
		template.URIs = append(template.URIs, u)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	must(t, err)
	return der
}

func TestBadCallsAreExplainedAndChangeNothing(t *testing.T) {
	h := newHouse(t)
	before := h.state(t)
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	must(t, err)
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	must(t, err)
	spoiled := csr(t, p256, "spiffe://example.org/x")
	spoiled[len(spoiled)-3] ^= 1
	const good = "spiffe://example.org/x"
	mint := func(csr []byte, ttl int32) func(context.Context) error {
		return func(ctx context.Context) error {
			_, err := svidv1.NewSVIDClient(h.server).MintX509SVID(ctx, &svidv1.MintX509SVIDRequest{Csr: csr, Ttl: ttl})
			return err
		}
	}
	jwt := func(path string, ttl int32, audience ...string) func(context.Context) error {
		return func(ctx context.Context) error {
			_, err := svidv1.NewSVIDClient(h.server).MintJWTSVID(ctx, &svidv1.MintJWTSVIDRequest{Id: &types.SPIFFEID{TrustDomain: "example.org", Path: path}, Ttl: ttl, Audience: audience})
			return err
		}
	}
	list := func(req *entryv1.ListEntriesRequest) func(context.Context) error {
		return func(ctx context.Context) error {
			_, err := entryv1.NewEntryClient(h.server).ListEntries(ctx, req)
			return err
		}
	}
	for name, c := range map[string]struct {
		call func(context.Context) error
		code codes.Code
		says string
	}{
		"no CSR":               {mint(nil, 0), codes.InvalidArgument, "missing CSR"},
		"garbage CSR":          {mint([]byte("garbage"), 0), codes.InvalidArgument, "malformed CSR"},
		"large CSR":            {mint(make([]byte, 20<<10), 0), codes.InvalidArgument, "the most is"},
		"CSR spoiled":          {mint(spoiled, 0), codes.InvalidArgument, "signature"},
		"CSR of a weak key":    {mint(csr(t, weak, good), 0), codes.InvalidArgument, "use ECDSA"},
		"CSR of P-224":         {mint(csr(t, p224, good), 0), codes.InvalidArgument, "use ECDSA"},
		"CSR without ID":       {mint(csr(t, p256), 0), codes.InvalidArgument, "needs exactly one"},
		"CSR with two IDs":     {mint(csr(t, p256, good, good), 0), codes.InvalidArgument, "needs exactly one"},
		"CSR of other domain":  {mint(csr(t, p256, "spiffe://other.org/x"), 0), codes.InvalidArgument, "other.org"},
		"CSR of server":        {mint(csr(t, p256, "spiffe://example.org/spire/server"), 0), codes.InvalidArgument, "reserved"},
		"lifetime below zero":  {mint(csr(t, p256, good), -1), codes.InvalidArgument, "lifetime"},
		"JWT without audience": {jwt("/x", 0), codes.InvalidArgument, "audience"},
		"JWT empty audience":   {jwt("/x", 0, ""), codes.InvalidArgument, "audience"},
		"JWT of no path":       {jwt("", 0, "us"), codes.InvalidArgument, "path"},
		"JWT below zero":       {jwt("/x", -1, "us"), codes.InvalidArgument, "lifetime"},
		"page below zero":      {list(&entryv1.ListEntriesRequest{PageSize: -1}), codes.InvalidArgument, "page size"},
		"garbage page token":   {list(&entryv1.ListEntriesRequest{PageToken: "\x01"}), codes.InvalidArgument, "page token"},
		"empty filter": {list(&entryv1.ListEntriesRequest{Filter: &entryv1.ListEntriesRequest_Filter{BySelectors: &types.SelectorMatch{}}}),
			codes.InvalidArgument, "empty selector set"},
		"no entry ID": {func(ctx context.Context) error {
			_, err := entryv1.NewEntryClient(h.server).GetEntry(ctx, &entryv1.GetEntryRequest{})
			return err
		}, codes.InvalidArgument, "missing entry ID"},
		"token of no time": {func(ctx context.Context) error {
			_, err := agentv1.NewAgentClient(h.server).CreateJoinToken(ctx, &agentv1.CreateJoinTokenRequest{Ttl: 0})
			return err
		}, codes.InvalidArgument, "ttl"},
		"agent's call": {func(ctx context.Context) error {
			_, err := svidv1.NewSVIDClient(h.server).BatchNewX509SVID(ctx, &svidv1.BatchNewX509SVIDRequest{})
			return err
		}, codes.PermissionDenied, "authorization denied"},
		"unknown method": {func(ctx context.Context) error {
			return h.server.Invoke(ctx, "/spire.api.server.entry.v1.Entry/Nothing", &emptypb.Empty{}, &emptypb.Empty{})
		}, codes.PermissionDenied, "authorization denied"},
		"oversized message": {func(ctx context.Context) error {
			_, err := bundlev1.NewBundleClient(h.server).GetFederatedBundle(ctx, &bundlev1.GetFederatedBundleRequest{TrustDomain: strings.Repeat("a", 5<<20)})
			return err
		}, codes.ResourceExhausted, "larger than max"},
		"malformed protobuf": {func(ctx context.Context) error {
			return h.server.Invoke(ctx, entryv1.Entry_GetEntry_FullMethodName, []byte{0xff, 0xff, 0xff}, &emptypb.Empty{}, grpc.ForceCodec(rawCodec{}))
		}, codes.Internal, "unmarshal"},
	} {
		t.Run(name, func(t *testing.T) {
			err := c.call(called(t))
			if status.Code(err) != c.code {
				t.Errorf("the error is %v, want %v", err, c.code)
			}
			says(t, strings.ToLower(status.Convert(err).Message()), strings.ToLower(c.says))
		})
	}
	h.unchanged(t, before)
	h.serves(t)
}

// rawCodec sends bytes as they are.
type rawCodec struct{}

func (rawCodec) Marshal(v any) ([]byte, error)   { return v.([]byte), nil }
func (rawCodec) Unmarshal(b []byte, _ any) error { return nil }
func (rawCodec) Name() string                    { return "proto" }

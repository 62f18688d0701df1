package entry_test

import (
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/selector"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

func valid() *entry.Entry {
	return &entry.Entry{
		ID:        "web-1",
		SPIFFEID:  spiffeid.RequireFromString("spiffe://example.org/web"),
		ParentID:  spiffeid.RequireFromString("spiffe://example.org/spire/agent/x/1"),
		Selectors: selector.Set{{Type: "unix", Value: "uid:1000"}},
	}
}

func TestValidEntriesAreAccepted(t *testing.T) {
	for name, change := range map[string]func(*entry.Entry){
		"the least":          func(*entry.Entry) {},
		"no ID yet":          func(e *entry.Entry) { e.ID = "" },
		"longest ID":         func(e *entry.Entry) { e.ID = strings.Repeat("a", entry.MaxID) },
		"lifetimes":          func(e *entry.Entry) { e.X509SVIDTTL, e.JWTSVIDTTL = time.Hour, time.Minute },
		"longest hint":       func(e *entry.Entry) { e.Hint = strings.Repeat("h", entry.MaxHint) },
		"DNS names":          func(e *entry.Entry) { e.DNSNames = []string{"web", "a.example.org", "*.b.example.org", "_x.y"} },
		"wildcard elsewhere": func(e *entry.Entry) { e.DNSNames = []string{"a.b.example.org", "*.example.org"} },
		"federation": func(e *entry.Entry) {
			e.FederatesWith = []spiffeid.TrustDomain{spiffeid.RequireTrustDomainFromString("other.org")}
		},
		"stored SVID": func(e *entry.Entry) {
			e.StoreSVID = true
			e.Selectors = selector.Set{{Type: "aws", Value: "a"}, {Type: "aws", Value: "b"}}
		},
		"alias": func(e *entry.Entry) { e.ParentID = spiffeid.RequireFromPath(td, entry.ServerPath) },
	} {
		e := valid()
		change(e)
		if err := e.Validate(td); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestInvalidEntriesAreRefusedByName(t *testing.T) {
	other := spiffeid.RequireTrustDomainFromString("other.org")
	for _, c := range []struct {
		change func(*entry.Entry)
		want   string
	}{
		{func(e *entry.Entry) { e.ID = "a/b" }, `contains '/'`},
		{func(e *entry.Entry) { e.ID = strings.Repeat("a", 256) }, "the most is 255"},
		{func(e *entry.Entry) { e.SPIFFEID = spiffeid.ID{} }, "missing SPIFFE ID"},
		{func(e *entry.Entry) { e.ParentID = spiffeid.ID{} }, "missing parent ID"},
		{func(e *entry.Entry) { e.SPIFFEID = td.ID() }, "has no path"},
		{func(e *entry.Entry) { e.ParentID = td.ID() }, "has no path"},
		{func(e *entry.Entry) { e.SPIFFEID = spiffeid.RequireFromPath(td, "/spire/server") }, "reserved"},
		{func(e *entry.Entry) { e.SPIFFEID = spiffeid.RequireFromPath(td, "/spire/agent/join_token/x") }, "reserved"},
		{func(e *entry.Entry) { e.SPIFFEID = spiffeid.RequireFromPath(td, "/hallmark/issuer/github") }, "reserved"},
		{func(e *entry.Entry) { e.SPIFFEID = spiffeid.RequireFromPath(other, "/a") }, "not in this server's trust domain"},
		{func(e *entry.Entry) { e.ParentID = spiffeid.RequireFromPath(other, "/a") }, "not in this server's trust domain"},
		{func(e *entry.Entry) { e.Selectors = nil }, "missing selectors"},
		{func(e *entry.Entry) { e.Selectors = selector.Set{{Type: "a:b", Value: "c"}} }, "colon"},
		{func(e *entry.Entry) { e.Selectors = selector.Set{{Type: "a"}} }, "no value"},
		{func(e *entry.Entry) { e.Selectors = make(selector.Set, 101) }, "the most is 100"},
		{func(e *entry.Entry) { e.X509SVIDTTL = -1 }, "X509-SVID lifetime is negative"},
		{func(e *entry.Entry) { e.JWTSVIDTTL = -time.Second }, "JWT-SVID lifetime is negative"},
		{func(e *entry.Entry) { e.X509SVIDTTL = 1500 * time.Millisecond }, "whole number of seconds"},
		{func(e *entry.Entry) { e.Hint = strings.Repeat("h", 1025) }, "the most is 1024"},
		{func(e *entry.Entry) { e.Hint = strings.Repeat("ä", 1000) }, "2000 bytes"},
		{func(e *entry.Entry) { e.DNSNames = []string{"a", "A"} }, "twice"},
		{func(e *entry.Entry) { e.DNSNames = []string{"*.example.org", "a.example.org"} }, "covered by"},
		{func(e *entry.Entry) { e.DNSNames = []string{"a.*.org"} }, "not its first label"},
		{func(e *entry.Entry) { e.FederatesWith = []spiffeid.TrustDomain{td} }, "its own trust domain"},
		{func(e *entry.Entry) { e.FederatesWith = []spiffeid.TrustDomain{other, other} }, "twice"},
		{func(e *entry.Entry) { e.FederatesWith = []spiffeid.TrustDomain{{}} }, "no name"},
		{func(e *entry.Entry) {
			e.StoreSVID = true
			e.Selectors = selector.Set{{Type: "aws", Value: "a"}, {Type: "gcp", Value: "b"}}
		}, "selectors of one type"},
		{func(e *entry.Entry) { e.ExpiresAt = time.Unix(-1, 0) }, "before 1970"},
	} {
		e := valid()
		c.change(e)
		if err := e.Validate(td); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("got error %v, want one with %q", err, c.want)
		}
	}
}

func TestSPIFFEID_ID18_ID19_TheLongestSPIFFEIDIs2048Bytes(t *testing.T) {
	e := valid()
	prefix := "spiffe://example.org/"
	e.SPIFFEID = spiffeid.RequireFromString(prefix + strings.Repeat("a", 2048-len(prefix)))
	if err := e.Validate(td); err != nil {
		t.Errorf("2048 bytes: %v", err)
	}
	e.SPIFFEID = spiffeid.RequireFromString(prefix + strings.Repeat("a", 2049-len(prefix)))
	if err := e.Validate(td); err == nil {
		t.Error("2049 bytes were accepted")
	}
}

func TestDNSNames(t *testing.T) {
	label63 := strings.Repeat("a", 63)
	for _, name := range []string{"a", "a-b", "a.b", "1.2", "_sip", "*.a", label63 + ".a", strings.Repeat("a.", 126) + "a"} {
		if err := entry.ValidateDNSName(name); err != nil {
			t.Errorf("%.20q: %v", name, err)
		}
	}
	for _, name := range []string{"", ".", "a.", ".a", "a..b", "-a", "a-", "*", "a*", "**.a", "a.*", "a b", "ä", "a/b", label63 + "a", strings.Repeat("a.", 126) + "aa"} {
		if entry.ValidateDNSName(name) == nil {
			t.Errorf("%.20q was accepted", name)
		}
	}
}

func TestRecordsKeepEveryField(t *testing.T) {
	e := valid()
	v := reflect.ValueOf(e).Elem()
	e.X509SVIDTTL, e.JWTSVIDTTL = time.Hour, time.Minute
	e.DNSNames = []string{"a"}
	e.FederatesWith = []spiffeid.TrustDomain{spiffeid.RequireTrustDomainFromString("other.org")}
	e.Hint = "h"
	e.Admin, e.Downstream, e.StoreSVID, e.DisableX509Prefetch, e.JWTIncludeJTI = true, true, true, true, true
	e.ExpiresAt, e.CreatedAt, e.RevisionNumber = time.Unix(2, 0), time.Unix(1, 0), 3
	for i := range v.NumField() {
		if v.Type().Field(i).IsExported() && v.Field(i).IsZero() {
			t.Fatalf("the test leaves %s empty", v.Type().Field(i).Name)
		}
	}
	value, err := proto.Marshal(e.Record())
	if err != nil {
		t.Fatal(err)
	}
	var rec hallmarkv1.Entry
	if err := proto.Unmarshal(value, &rec); err != nil {
		t.Fatal(err)
	}
	got, err := entry.FromRecord(&rec)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, e) {
		t.Errorf("got  %+v\nwant %+v", got, e)
	}
}

func TestSimilarEntriesHaveOneKey(t *testing.T) {
	a, b := valid(), valid()
	b.ID, b.Hint, b.Admin, b.X509SVIDTTL = "other", "hint", true, time.Hour
	if a.Key() != b.Key() {
		t.Error("entries that differ in nothing that counts have different keys")
	}
	keys := map[string]string{a.Key(): "the first"}
	for name, change := range map[string]func(*entry.Entry){
		"SPIFFE ID":  func(e *entry.Entry) { e.SPIFFEID = spiffeid.RequireFromPath(td, "/b") },
		"parent ID":  func(e *entry.Entry) { e.ParentID = spiffeid.RequireFromPath(td, "/b") },
		"selectors":  func(e *entry.Entry) { e.Selectors = selector.Set{{Type: "unix", Value: "uid:1"}} },
		"more":       func(e *entry.Entry) { e.Selectors = append(e.Selectors, selector.Selector{Type: "unix", Value: "x"}) },
		"one of two": func(e *entry.Entry) { e.Selectors = selector.Set{{Type: "unix", Value: "uid:1000\x006 unix:x"}} },
		"the other":  func(e *entry.Entry) { e.Selectors = selector.Set{{Type: "unix", Value: "uid:1000\x00unix:x"}} },
	} {
		e := valid()
		change(e)
		if other, ok := keys[e.Key()]; ok {
			t.Errorf("%s and %s have one key", name, other)
		}
		keys[e.Key()] = name
	}
}

func TestAnEntryEndsAtItsExpiry(t *testing.T) {
	e := valid()
	now := time.Unix(1000, 0)
	if e.Expired(now) {
		t.Error("an entry without an end has expired")
	}
	e.ExpiresAt = now
	if !e.Expired(now) || e.Expired(now.Add(-time.Nanosecond)) {
		t.Error("an entry does not end exactly at its end")
	}
}

func FuzzValidateDNSName(f *testing.F) {
	f.Add("*.example.org")
	f.Fuzz(func(t *testing.T, name string) {
		if entry.ValidateDNSName(name) == nil && (len(name) > 253 || strings.ContainsAny(name, " /\x00\n") || strings.Contains(name, "..")) {
			t.Fatalf("%q was accepted", name)
		}
	})
}

func ExampleEntry_Validate() {
	e := &entry.Entry{
		SPIFFEID: spiffeid.RequireFromString("spiffe://example.org/web"),
		ParentID: spiffeid.RequireFromString("spiffe://example.org/node"),
	}
	fmt.Println(e.Validate(spiffeid.RequireTrustDomainFromString("example.org")))
	// Output: missing selectors; an entry needs at least one
}

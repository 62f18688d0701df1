package feed

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/hallmark-id/hallmark/pkg/digest"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

// Over a connection this would take a quarter of a gigabyte.
func TestAnEndlessStepIsNotHeldInMemory(t *testing.T) {
	large := &hallmarkv1.FollowResponse{More: true, GoneEntries: []string{strings.Repeat("x", 15<<20)}}
	var s step
	for n := 1; ; n++ {
		if err := s.add(large); err != nil {
			if !strings.Contains(err.Error(), "more than 268435456 bytes") || n != 18 {
				t.Errorf("after %d messages: %v", n, err)
			}
			return
		}
		if n > 100 {
			t.Fatal("there is no end")
		}
	}
}

func FuzzStep(f *testing.F) {
	seed, err := proto.Marshal(&hallmarkv1.FollowResponse{
		Revision: 1, Complete: true,
		Entries: []*hallmarkv1.Entry{
			{Id: "a", SpiffeId: "spiffe://example.org/a", ParentId: "spiffe://example.org/b", Selectors: []*hallmarkv1.Selector{{Type: "x", Value: "y"}}},
			{Id: "b", SpiffeId: "http://"},
		},
		Bundles: []*hallmarkv1.Bundle{{
			TrustDomain: "example.org", X509Authorities: []*hallmarkv1.X509Authority{{Asn1: []byte("x")}},
			JwtAuthorities: []*hallmarkv1.JWTAuthority{{KeyId: "j", PublicKey: []byte("x")}}, WitAuthorities: []*hallmarkv1.JWTAuthority{{KeyId: "w"}},
		}},
		GoneEntries: []string{"c"}, GoneBundles: []string{"other.org"},
		Defaults: &hallmarkv1.Defaults{X509SvidTtl: -1},
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Fuzz(func(t *testing.T, data []byte) {
		var r hallmarkv1.FollowResponse
		if proto.Unmarshal(data, &r) != nil {
			return
		}
		var s step
		if s.add(&r) != nil {
			return
		}
		if got := len(s.change.Entries) + len(s.unread); got != len(r.Entries) {
			t.Errorf("%d of %d entries are accounted for", got, len(r.Entries))
		}
		if len(s.change.Bundles) != len(r.Bundles) {
			t.Errorf("%d of %d bundles are accounted for", len(s.change.Bundles), len(r.Bundles))
		}
		u := make(unread)
		u.take(&s)
		var sum digest.Sum
		u.addTo(&sum)
		if len(u) > 0 == (sum == digest.Sum{}) {
			t.Errorf("%d unread entries have the digest %v", len(u), sum)
		}
	})
}

package api

import (
	"encoding/base64"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
)

func TestMalformedPageTokensAreRefused(t *testing.T) {
	for _, token := range []string{
		" ", "x", "%", "=", "MQ", pageToken("a") + "=", pageToken("a") + "\n",
		base64.StdEncoding.EncodeToString([]byte("1a")), base64.RawURLEncoding.EncodeToString([]byte("2a")),
		pageToken(strings.Repeat("a", maxPageKey+1)), strings.Repeat("A", 1<<20),
	} {
		_, err := newPage(1, token)
		wantCode(t, token[:min(len(token), 20)], err, codes.InvalidArgument, "malformed page token")
	}
}

func TestAPageTokenBringsBackItsKey(t *testing.T) {
	for _, key := range []string{"a", "a/b c", "\xff\x00", strings.Repeat("k", maxPageKey)} {
		if p, err := newPage(3, pageToken(key)); err != nil || p.after != key || p.size != 3 {
			t.Errorf("got %+v, %v", p, err)
		}
	}
}

func TestAPageLooksAtNoMoreThanItNeeds(t *testing.T) {
	seen := 0
	items := func(yield func(int) bool) {
		for i := range 1000 {
			seen++
			if !yield(i) {
				return
			}
		}
	}
	got, next := collectPage(page{size: 3}, items, func(i int) string { return string(rune('a' + i)) })
	if !slices.Equal(got, []int{0, 1, 2}) || next != pageToken("c") || seen != 4 {
		t.Errorf("got %v and token %q after %d items", got, next, seen)
	}
}

func FuzzPageToken(f *testing.F) {
	f.Add(pageToken("entry"))
	f.Add("")
	f.Fuzz(func(t *testing.T, token string) {
		p, err := newPage(1, token)
		if err != nil || token == "" {
			return
		}
		if len(p.after) > maxPageKey || pageToken(p.after) != token {
			t.Errorf("%q was read as %q", token, p.after)
		}
	})
}

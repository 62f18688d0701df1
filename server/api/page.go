package api

import (
	"encoding/base64"
	"fmt"
	"iter"
	"math"
	"strings"
)

// A page token is the key of the last item of the page before, with the
// encoding's version in front. Keys are stable, so a token stays good whatever
// is created or deleted between two pages, on every server of the trust
// domain.
const (
	pageTokenVersion = "1"
	maxPageKey       = 2048 // bytes; a SPIFFE ID is the longest key
)

// page is the part of a list that a caller asked for.
type page struct {
	after string // the key of the last item of the page before; empty for the first page
	size  int    // at most this many items
}

// newPage reads a request's page size (0 is everything) and token (empty is
// the first page).
func newPage(size int32, token string) (page, error) {
	p := page{size: int(size)}
	switch {
	case size < 0:
		return page{}, invalidArgument("page size is negative: %d", size)
	case size == 0:
		p.size = math.MaxInt
	}
	if token == "" {
		return p, nil
	}
	var err error
	p.after, err = parsePageToken(token)
	return p, err
}

func parsePageToken(token string) (string, error) {
	malformed := invalidArgument("malformed page token; use the next_page_token of the page before")
	if len(token) > base64.RawURLEncoding.EncodedLen(maxPageKey+len(pageTokenVersion)) {
		return "", malformed
	}
	b, err := base64.RawURLEncoding.DecodeString(token)
	key := strings.TrimPrefix(string(b), pageTokenVersion)
	if err != nil || key == "" || pageToken(key) != token { // one key, one token
		return "", malformed
	}
	return key, nil
}

func pageToken(key string) string {
	return base64.RawURLEncoding.EncodeToString([]byte(pageTokenVersion + key))
}

// collectPage takes a page from items that are in the order of their keys and
// begin after p.after. It returns the token of the next page, empty if this is
// the last. It looks at no more items than it needs to know that.
func collectPage[T any](p page, items iter.Seq[T], key func(T) string) (taken []T, next string) {
	for item := range items {
		if len(taken) == p.size {
			return taken, pageToken(key(taken[len(taken)-1]))
		}
		taken = append(taken, item)
	}
	return taken, ""
}

// maxBatch bounds the items of one batch call. A message of gRPC's default
// size, 4 MiB, holds about three times as many small entries.
const maxBatch = 10_000

func checkBatch(n int) error {
	if n > maxBatch {
		return invalidArgument("batch has %d items; the most is %d: send several", n, maxBatch)
	}
	return nil
}

// indexed names the item of a batch or list that an error is about.
func indexed(what string, i int, err error) error { return fmt.Errorf("%s %d: %w", what, i, err) }

package held

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/hallmark-id/hallmark/pkg/statuslist"
)

// maxStatusBits is the largest status list that is taken, in bytes as it is sent.
const maxStatusBits = 1 << 20

// StatusList is which tokens of one list of the own trust domain were revoked.
// It does not change.
type StatusList struct {
	id       string
	revision int64
	list     *statuslist.List // nil: it cannot be read
}

// NewStatusList reads a status list: its ID, which is the last part of its URI,
// the revision that wrote it, and its statuses of one bit as they are sent. One
// that cannot be read counts in the digest, and revokes nothing; the error says
// why.
func NewStatusList(id string, revision int64, bits []byte) (*StatusList, error) {
	l := &StatusList{id: id, revision: revision}
	if len(bits) > maxStatusBits {
		return l, fmt.Errorf("status list %s has %d bytes; the most is %d", id, len(bits), maxStatusBits)
	}
	var err error
	if l.list, err = statuslist.Decompress(1, bits); err != nil {
		return l, fmt.Errorf("status list %s: %w", id, err)
	}
	return l, nil
}

// takeStatusLists applies a change of status lists: tokens of this node that were
// revoked are replaced.
func (h *Held) takeStatusLists(c Change) {
	changed := false
	gone := func(id string) {
		if old := h.lists[id]; old != nil {
			delete(h.lists, id)
			h.sum.SubStatusList(id, old.revision)
			changed = true
		}
	}
	if c.Complete {
		for id := range h.lists {
			if !slices.ContainsFunc(c.StatusLists, func(is *StatusList) bool { return is.id == id }) {
				gone(id)
			}
		}
	}
	for _, id := range c.GoneStatusLists {
		gone(id)
	}
	for _, l := range c.StatusLists {
		if old := h.lists[l.id]; old != nil && old.revision == l.revision {
			continue // told again by a complete change
		}
		gone(l.id)
		h.lists[l.id] = l
		h.sum.AddStatusList(l.id, l.revision)
		changed = true
	}
	if changed {
		h.recheck()
		h.jwts.recheck(h)
	}
}

// signature is what a token says of who vouches for it.
type signature struct {
	keyID  string               // of its authority; empty: it does not say
	status statuslist.Reference // zero: it has none
}

// revoked reports whether a token is in a status list as not valid.
func (h *Held) revoked(ref statuslist.Reference) bool {
	if ref.URI == "" {
		return false
	}
	l := h.lists[path.Base(ref.URI)]
	if l == nil || l.list == nil {
		return false
	}
	status, ok := l.list.Status(ref.Index)
	return ok && status != statuslist.Valid
}

// signatureOf reads a token that the server sent. What it does not say, or not
// readably, is zero.
func signatureOf(token string) (s signature) {
	header, rest, _ := strings.Cut(token, ".")
	claims, _, _ := strings.Cut(rest, ".")
	s.keyID, _ = part(header)["kid"].(string)
	s.status, _, _ = statuslist.ReferenceOf(part(claims))
	return s
}

func part(encoded string) map[string]any {
	raw, err := base64.RawURLEncoding.DecodeString(encoded)
	if err != nil {
		return nil
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	var object map[string]any
	if d.Decode(&object) != nil {
		return nil
	}
	return object
}

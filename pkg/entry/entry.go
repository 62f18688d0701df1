// Package entry defines the registration entry: who gets which SPIFFE ID.
//
// An [Entry] is immutable once it is shared. Make or change one by filling a
// value and calling [Entry.Validate], which also puts it into canonical form;
// [FromRecord] and [Entry.Record] convert from and to the form that the store
// and the push stream carry.
package entry

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/selector"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

// Bounds of one entry.
const (
	MaxID        = 255  // characters of an entry ID
	MaxSPIFFEID  = 2048 // bytes of a SPIFFE ID; SPIFFE-ID §2.3
	MaxHint      = 1024 // characters; Workload API §8
	MaxSelectors = 100
	MaxNames     = 100 // DNS names
	MaxFederates = 100 // trust domains
)

// Entry is a registration entry.
type Entry struct {
	ID        string
	SPIFFEID  spiffeid.ID
	ParentID  spiffeid.ID  // of the server, a node, a node alias or another entry
	Selectors selector.Set // at least one; all must match

	X509SVIDTTL time.Duration // whole seconds; 0 is the server's default
	JWTSVIDTTL  time.Duration // whole seconds; 0 is the server's default

	DNSNames      []string // of the X509-SVID; the first becomes its common name
	FederatesWith []spiffeid.TrustDomain
	Hint          string // tells a workload its SVIDs apart

	Admin      bool // the identity may administer the server
	Downstream bool // the identity may run an intermediate authority
	StoreSVID  bool // SVIDs go to a store, not to the Workload API

	DisableX509Prefetch bool // agents sign an X509-SVID only when asked for it
	JWTIncludeJTI       bool // JWT-SVIDs carry a unique jti and are not cached

	ExpiresAt      time.Time // zero is never
	CreatedAt      time.Time
	RevisionNumber int64 // 0 when created, one more at each update

	unknown string // what a newer version wrote into the record, as it came
}

// Expired reports whether the entry has passed its end at now.
func (e *Entry) Expired(now time.Time) bool {
	return !e.ExpiresAt.IsZero() && !now.Before(e.ExpiresAt)
}

// IsAlias reports whether the entry is a node alias: its parent is the server,
// so its selectors are those of nodes, not of workloads.
func (e *Entry) IsAlias() bool { return e.ParentID.Path() == ServerPath }

// Reserved reports whether an ID is in a namespace where no workload may have
// its ID: that of servers and agents, /spire/, where it could pass for one of
// them, or that of outside issuers, /hallmark/, where it would be authorized for
// what is registered for an issuer's tokens.
func Reserved(id spiffeid.ID) bool {
	for _, namespace := range []string{"/spire", "/hallmark"} {
		if rest, ok := strings.CutPrefix(id.Path(), namespace); ok && (rest == "" || rest[0] == '/') {
			return true
		}
	}
	return false
}

// ServerPath is the path of the server's own SPIFFE ID, as SPIRE has it.
const ServerPath = "/spire/server"

// Key returns what makes two entries similar: SPIFFE ID, parent ID and the set
// of selectors. Two entries with one key may not both exist.
func (e *Entry) Key() string {
	var b strings.Builder
	b.WriteString(e.SPIFFEID.String())
	b.WriteByte(0)
	b.WriteString(e.ParentID.String())
	for _, s := range e.Selectors { // with its length, as a value may hold anything
		b.WriteByte(0)
		b.WriteString(strconv.Itoa(len(s.Type) + 1 + len(s.Value)))
		b.WriteByte(' ')
		b.WriteString(s.Type)
		b.WriteByte(':')
		b.WriteString(s.Value)
	}
	return b.String()
}

// Validate puts the entry into canonical form and checks it for the trust
// domain td. The error names the field that is wrong and what it should be.
// The entry ID may be empty: the registry then makes one.
func (e *Entry) Validate(td spiffeid.TrustDomain) error {
	if e.ID != "" {
		if err := validateID(e.ID); err != nil {
			return err
		}
	}
	if e.SPIFFEID.IsZero() {
		return errors.New("missing SPIFFE ID")
	}
	if e.ParentID.IsZero() {
		return errors.New("missing parent ID")
	}
	if err := validateMember("SPIFFE ID", e.SPIFFEID, td); err != nil {
		return err
	}
	if e.SPIFFEID.Path() == "" {
		return fmt.Errorf("SPIFFE ID %q has no path", e.SPIFFEID)
	}
	if Reserved(e.SPIFFEID) {
		return fmt.Errorf("SPIFFE ID %q is in a namespace that is reserved: /spire/ for servers and agents, /hallmark/ for outside issuers", e.SPIFFEID)
	}
	if err := validateMember("parent ID", e.ParentID, td); err != nil {
		return err
	}
	if e.ParentID.Path() == "" {
		return fmt.Errorf("parent ID %q has no path", e.ParentID)
	}
	if err := e.validateSelectors(); err != nil {
		return err
	}
	if err := validateTTL("X509-SVID lifetime", e.X509SVIDTTL); err != nil {
		return err
	}
	if err := validateTTL("JWT-SVID lifetime", e.JWTSVIDTTL); err != nil {
		return err
	}
	if n := len([]rune(e.Hint)); n > MaxHint {
		return fmt.Errorf("hint is %d characters long; the most is %d", n, MaxHint)
	}
	if len(e.Hint) > MaxHint { // Workload API §8 counts bytes
		return fmt.Errorf("hint is %d bytes long; the most is %d", len(e.Hint), MaxHint)
	}
	if err := e.validateDNSNames(); err != nil {
		return err
	}
	if err := e.validateFederates(td); err != nil {
		return err
	}
	if !e.ExpiresAt.IsZero() && e.ExpiresAt.Unix() < 0 {
		return errors.New("expiry lies before 1970")
	}
	return nil
}

func validateID(id string) error {
	if len(id) > MaxID {
		return fmt.Errorf("entry ID is %d characters long; the most is %d", len(id), MaxID)
	}
	for _, r := range id {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '-', r == '_', r == '.':
		default:
			return fmt.Errorf("entry ID %q contains %q; letters, digits, '-', '_' and '.' are allowed", id, r)
		}
	}
	return nil
}

func validateMember(what string, id spiffeid.ID, td spiffeid.TrustDomain) error {
	if !id.MemberOf(td) {
		return fmt.Errorf("%s %q is not in this server's trust domain %q", what, id, td.Name())
	}
	if n := len(id.String()); n > MaxSPIFFEID {
		return fmt.Errorf("%s is %d bytes long; the most is %d", what, n, MaxSPIFFEID)
	}
	return nil
}

func (e *Entry) validateSelectors() error {
	if len(e.Selectors) == 0 {
		return errors.New("missing selectors; an entry needs at least one")
	}
	if len(e.Selectors) > MaxSelectors {
		return fmt.Errorf("entry has %d selectors; the most is %d", len(e.Selectors), MaxSelectors)
	}
	for _, s := range e.Selectors {
		if _, err := selector.New(s.Type, s.Value); err != nil {
			return err
		}
		if e.StoreSVID && s.Type != e.Selectors[0].Type {
			return fmt.Errorf("an entry whose SVID is stored needs selectors of one type; it has %q and %q", e.Selectors[0].Type, s.Type)
		}
	}
	e.Selectors = selector.NewSet(e.Selectors...)
	return nil
}

func validateTTL(what string, d time.Duration) error {
	switch {
	case d < 0:
		return fmt.Errorf("%s is negative: %v", what, d)
	case d%time.Second != 0:
		return fmt.Errorf("%s %v is not a whole number of seconds", what, d)
	case d/time.Second > math.MaxInt32:
		return fmt.Errorf("%s %v is too long", what, d)
	}
	return nil
}

func (e *Entry) validateFederates(td spiffeid.TrustDomain) error {
	if len(e.FederatesWith) > MaxFederates {
		return fmt.Errorf("entry federates with %d trust domains; the most is %d", len(e.FederatesWith), MaxFederates)
	}
	seen := make(map[spiffeid.TrustDomain]bool, len(e.FederatesWith))
	for _, f := range e.FederatesWith {
		if f.IsZero() {
			return errors.New("entry federates with a trust domain that has no name")
		}
		if f == td {
			return fmt.Errorf("entry federates with its own trust domain %q", td.Name())
		}
		if seen[f] {
			return fmt.Errorf("entry federates with %q twice", f.Name())
		}
		seen[f] = true
	}
	return nil
}

// FromRecord reads the stored form. It trusts the store for everything but the
// SPIFFE IDs, which it parses.
func FromRecord(r *hallmarkv1.Entry) (*Entry, error) {
	id, err := spiffeid.FromString(r.SpiffeId)
	if err != nil {
		return nil, fmt.Errorf("entry %q: SPIFFE ID: %w", r.Id, err)
	}
	parent, err := spiffeid.FromString(r.ParentId)
	if err != nil {
		return nil, fmt.Errorf("entry %q: parent ID: %w", r.Id, err)
	}
	e := &Entry{
		ID:                  r.Id,
		SPIFFEID:            id,
		ParentID:            parent,
		Selectors:           SelectorsFromRecord(r.Selectors),
		X509SVIDTTL:         time.Duration(r.X509SvidTtl) * time.Second,
		JWTSVIDTTL:          time.Duration(r.JwtSvidTtl) * time.Second,
		DNSNames:            r.DnsNames,
		Hint:                r.Hint,
		Admin:               r.Admin,
		Downstream:          r.Downstream,
		StoreSVID:           r.StoreSvid,
		DisableX509Prefetch: r.DisableX509SvidPrefetch,
		JWTIncludeJTI:       r.JwtSvidIncludeJti,
		ExpiresAt:           timeOf(r.ExpiresAt),
		CreatedAt:           timeOf(r.CreatedAt),
		RevisionNumber:      r.RevisionNumber,
		unknown:             string(r.ProtoReflect().GetUnknown()),
	}
	for _, name := range r.FederatesWith {
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			return nil, fmt.Errorf("entry %q: federates with: %w", r.Id, err)
		}
		e.FederatesWith = append(e.FederatesWith, td)
	}
	return e, nil
}

// Record returns the stored form. What a newer version had written into the record
// that an entry was read from is in it, as it was.
func (e *Entry) Record() *hallmarkv1.Entry {
	r := &hallmarkv1.Entry{
		Id:                      e.ID,
		SpiffeId:                e.SPIFFEID.String(),
		ParentId:                e.ParentID.String(),
		Selectors:               SelectorsRecord(e.Selectors),
		X509SvidTtl:             int32(e.X509SVIDTTL / time.Second),
		JwtSvidTtl:              int32(e.JWTSVIDTTL / time.Second),
		DnsNames:                e.DNSNames,
		Hint:                    e.Hint,
		Admin:                   e.Admin,
		Downstream:              e.Downstream,
		StoreSvid:               e.StoreSVID,
		DisableX509SvidPrefetch: e.DisableX509Prefetch,
		JwtSvidIncludeJti:       e.JWTIncludeJTI,
		ExpiresAt:               unixOf(e.ExpiresAt),
		CreatedAt:               unixOf(e.CreatedAt),
		RevisionNumber:          e.RevisionNumber,
	}
	for _, td := range e.FederatesWith {
		r.FederatesWith = append(r.FederatesWith, td.Name())
	}
	if e.unknown != "" {
		r.ProtoReflect().SetUnknown([]byte(e.unknown))
	}
	return r
}

// SelectorsFromRecord reads the stored form of a set of selectors.
func SelectorsFromRecord(rs []*hallmarkv1.Selector) selector.Set {
	out := make([]selector.Selector, len(rs))
	for i, r := range rs {
		out[i] = selector.Selector{Type: r.Type, Value: r.Value}
	}
	return selector.NewSet(out...)
}

// SelectorsRecord returns the stored form of a set of selectors.
func SelectorsRecord(set selector.Set) []*hallmarkv1.Selector {
	out := make([]*hallmarkv1.Selector, len(set))
	for i, s := range set {
		out[i] = &hallmarkv1.Selector{Type: s.Type, Value: s.Value}
	}
	return out
}

func timeOf(unix int64) time.Time {
	if unix == 0 {
		return time.Time{}
	}
	return time.Unix(unix, 0)
}

func unixOf(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}

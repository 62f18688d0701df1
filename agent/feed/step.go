package feed

import (
	"crypto/x509"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/digest"
	"github.com/hallmark-id/hallmark/pkg/entry"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

// Bounds of one step, which is held in memory until it is whole.
const (
	maxRecords = 1 << 20   // entries and bundles, also those gone
	maxBytes   = 256 << 20 // of messages
)

// step collects the messages of one revision, which are applied at once.
type step struct {
	change  held.Change
	records int
	bytes   int
	servers *hallmarkv1.Servers // nil: nothing was said of them

	unread []*hallmarkv1.Entry // entries that this agent cannot read
	errors []error             // why, and what else was left out
}

// add takes in one message. It fails if the step is beyond its bounds. What
// cannot be read (a newer server's entry, say, or a foreign certificate that
// this agent's Go refuses) does not keep the rest from the node.
func (s *step) add(r *hallmarkv1.FollowResponse) error {
	s.records += len(r.Entries) + len(r.GoneEntries) + len(r.Bundles) + len(r.GoneBundles) + len(r.Crls) + len(r.GoneCrls) +
		len(r.RevokedTokens) + len(r.GoneRevokedTokens)
	s.bytes += proto.Size(r)
	switch {
	case s.records > maxRecords:
		return fmt.Errorf("server sent more than %d records in one step", maxRecords)
	case s.bytes > maxBytes:
		return fmt.Errorf("server sent more than %d bytes in one step", maxBytes)
	case r.Revision < 0:
		return fmt.Errorf("server sent the revision %d", r.Revision)
	}
	c := &s.change
	c.Complete = c.Complete || r.Complete
	c.Revision = r.Revision
	if r.Servers != nil {
		s.servers = r.Servers
	}
	for _, record := range r.Entries {
		e, err := entry.FromRecord(record)
		if err != nil {
			s.unread = append(s.unread, record)
			s.errors = append(s.errors, err)
			continue
		}
		c.Entries = append(c.Entries, e)
	}
	for _, record := range r.Bundles {
		b, err := s.readBundle(record)
		if err != nil {
			return err
		}
		c.Bundles = append(c.Bundles, b)
	}
	c.GoneEntries = append(c.GoneEntries, r.GoneEntries...)
	for _, name := range r.GoneBundles {
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			return fmt.Errorf("server sent the trust domain %q: %w", name, err)
		}
		c.GoneBundles = append(c.GoneBundles, td)
	}
	for _, record := range r.Crls {
		crl, err := held.NewCRL(record.AuthorityId, record.Number, record.Der)
		if err != nil {
			s.errors = append(s.errors, err)
		}
		c.CRLs = append(c.CRLs, crl)
	}
	c.GoneCRLs = append(c.GoneCRLs, r.GoneCrls...)
	for _, record := range r.RevokedTokens {
		l, err := held.NewStatusList(record.ListId, record.Revision, record.Bits)
		if err != nil {
			s.errors = append(s.errors, err)
		}
		c.StatusLists = append(c.StatusLists, l)
	}
	c.GoneStatusLists = append(c.GoneStatusLists, r.GoneRevokedTokens...)
	if d := r.Defaults; d != nil {
		c.X509TTL = time.Duration(d.X509SvidTtl) * time.Second
		c.JWTTTL = time.Duration(d.JwtSvidTtl) * time.Second
	}
	return nil
}

// readBundle reads a bundle without the authorities that cannot be read.
func (s *step) readBundle(record *hallmarkv1.Bundle) (*bundle.Bundle, error) {
	b, err := bundle.FromRecord(record)
	if err == nil {
		return b, nil
	}
	s.errors = append(s.errors, err)
	readable := &hallmarkv1.Bundle{
		TrustDomain: record.TrustDomain, SequenceNumber: record.SequenceNumber, RefreshHint: record.RefreshHint,
	}
	for _, a := range record.X509Authorities {
		if _, err := x509.ParseCertificate(a.Asn1); err == nil {
			readable.X509Authorities = append(readable.X509Authorities, a)
		}
	}
	readable.JwtAuthorities = readableKeys(record.JwtAuthorities)
	readable.WitAuthorities = readableKeys(record.WitAuthorities)
	return bundle.FromRecord(readable)
}

func readableKeys(as []*hallmarkv1.JWTAuthority) (readable []*hallmarkv1.JWTAuthority) {
	for _, a := range as {
		if _, err := x509.ParsePKIXPublicKey(a.PublicKey); err == nil {
			readable = append(readable, a)
		}
	}
	return readable
}

// unread is the entries that the server counts among this agent's and the agent
// could not read, by ID: without them the digests would differ for ever.
type unread map[string]*hallmarkv1.Entry

// take brings a step's entries in. An older version of an entry that cannot be
// read is taken from the node: what it said is true no more.
func (u unread) take(s *step) {
	if s.change.Complete {
		clear(u)
	}
	for _, e := range s.change.Entries {
		delete(u, e.ID)
	}
	for _, id := range s.change.GoneEntries {
		delete(u, id)
	}
	for _, e := range s.unread {
		u[e.Id] = e
		s.change.GoneEntries = append(s.change.GoneEntries, e.Id)
	}
}

func (u unread) addTo(sum *digest.Sum) {
	for _, e := range u {
		sum.AddEntry(e.Id, e.RevisionNumber, e.CreatedAt)
	}
}

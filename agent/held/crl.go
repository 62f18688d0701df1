package held

import (
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
)

// maxCRL is the largest CRL that is taken, in bytes.
const maxCRL = 1 << 20

// CRL is what an authority of the own trust domain has revoked. It does not
// change.
type CRL struct {
	authority string // its key ID in hex
	number    uint64
	der       []byte          // nil: it cannot be read
	serials   map[string]bool // big endian, without leading zeros
}

// ID returns the ID of the CRL's authority: its key ID in hex.
func (c *CRL) ID() string { return c.authority }

// Number returns the CRL's number.
func (c *CRL) Number() uint64 { return c.number }

// NewCRL reads the CRL of an authority, named by its key ID in hex. One that
// cannot be read counts in the digest, and revokes nothing; the error says why.
// Its signature is for those to verify who are given it: here it has SVIDs
// replaced, which an agent's server may ask for anyway.
func NewCRL(authority string, number uint64, der []byte) (*CRL, error) {
	c := &CRL{authority: authority, number: number}
	if len(der) > maxCRL {
		return c, fmt.Errorf("the CRL of authority %s has %d bytes; the most is %d", authority, len(der), maxCRL)
	}
	list, err := x509.ParseRevocationList(der)
	if err != nil {
		return c, fmt.Errorf("the CRL of authority %s: %w", authority, err)
	}
	c.der, c.serials = der, make(map[string]bool, len(list.RevokedCertificateEntries))
	for _, e := range list.RevokedCertificateEntries {
		c.serials[string(e.SerialNumber.Bytes())] = true
	}
	return c, nil
}

// crls are those that are held.
type crls struct {
	all map[string]*CRL // by authority
	der [][]byte        // of those that can be read, in the order of authorities; shared, it does not change
}

// takeCRLs applies a change of CRLs: SVIDs of this node that were revoked are
// replaced, and everybody is told.
func (h *Held) takeCRLs(c Change) {
	changed := false
	gone := func(id string) {
		if old := h.crls.all[id]; old != nil {
			delete(h.crls.all, id)
			h.sum.SubCRL(id, old.number)
			changed = true
		}
	}
	if c.Complete {
		for id := range h.crls.all {
			if !slices.ContainsFunc(c.CRLs, func(is *CRL) bool { return is.authority == id }) {
				gone(id)
			}
		}
	}
	for _, id := range c.GoneCRLs {
		gone(id)
	}
	for _, crl := range c.CRLs {
		if old := h.crls.all[crl.authority]; old != nil && old.number == crl.number {
			continue // told again by a complete change
		}
		gone(crl.authority)
		h.crls.all[crl.authority] = crl
		h.sum.AddCRL(crl.authority, crl.number)
		changed = true
	}
	if !changed {
		return
	}
	h.crls.der = nil
	for _, id := range slices.Sorted(maps.Keys(h.crls.all)) {
		if crl := h.crls.all[id]; crl.der != nil {
			h.crls.der = append(h.crls.der, crl.der)
		}
	}
	h.recheck()
	for _, v := range h.views.all {
		v.changed()
	}
}

// distrusts reports whether an SVID is to be replaced before its time: it was
// revoked, or those who vouch for it are not to be relied on.
func (h *Held) distrusts(s svid) bool {
	if x, ok := s.(*X509SVID); ok && len(h.crls.all) > 0 {
		for i, issuer := range x.issuers {
			if crl := h.crls.all[hex.EncodeToString([]byte(issuer))]; crl != nil && crl.serials[x.serials[i]] {
				return true
			}
		}
	}
	if w, ok := s.(*WITSVID); ok && h.revoked(w.status) {
		return true
	}
	return s.distrusted(h.trust)
}

package held

import "github.com/hallmark-id/hallmark/pkg/bundle"

// trust is what the own trust domain's bundle says of those who sign: by X.509
// key ID and by kid, whether it is to be relied on (false: tainted). A nil
// trust, before there is a bundle, says nothing.
type trust struct {
	x509     map[string]bool
	jwt, wit map[string]bool
}

func trustIn(b *bundle.Bundle) *trust {
	if b == nil {
		return nil
	}
	t := &trust{x509: make(map[string]bool), jwt: make(map[string]bool), wit: make(map[string]bool)}
	for _, a := range b.X509Authorities {
		id := string(a.Certificate.SubjectKeyId)
		if good, ok := t.x509[id]; !ok || good { // one mark is enough for a key
			t.x509[id] = !a.Tainted
		}
	}
	for _, a := range b.JWTAuthorities {
		t.jwt[a.KeyID] = !a.Tainted
	}
	for _, a := range b.WITAuthorities {
		t.wit[a.KeyID] = !a.Tainted
	}
	return t
}

// distrusted reports whether an X509-SVID is to be replaced before its time:
// one of those who vouch for it is tainted, or none is in the bundle.
func (x *X509SVID) distrusted(t *trust) bool {
	if t == nil || len(x.issuers) == 0 {
		return false
	}
	_, known := t.x509[""] // an authority without a key ID may be anyone's issuer
	for _, id := range x.issuers {
		good, ok := t.x509[id]
		if ok && !good {
			return true
		}
		known = known || ok
	}
	return !known
}

// distrusted reports whether a WIT-SVID is to be replaced before its time: the
// key that signed it is tainted, or not in the bundle.
func (w *WITSVID) distrusted(t *trust) bool { return t != nil && !t.wit[w.keyID] }

// distrustsKey reports whether a JWT-SVID signed by a key is not to be handed
// out again: the key is tainted, or not in the bundle. A token without a kid
// says nothing.
func (t *trust) distrustsKey(kid string) bool {
	return t != nil && kid != "" && !t.jwt[kid]
}

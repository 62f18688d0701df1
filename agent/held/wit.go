package held

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/exp/svid/witsvid"

	"github.com/hallmark-id/hallmark/pkg/statuslist"
)

// witAlgorithm is what a workload signs proofs with: that of the keys made here.
const witAlgorithm = jose.ES256

// WITRequest asks for one WIT-SVID.
type WITRequest struct {
	EntryID   string
	PublicKey []byte // SubjectPublicKeyInfo, DER
	Algorithm string // that the key is for
}

// WITResult answers one WITRequest: either Token, or Err.
type WITResult struct {
	Token string
	Err   error
}

// WITSVID is a signed WIT-SVID with its key. It does not change.
type WITSVID struct {
	Token     string
	Key       string // a private JWK, as the Workload API carries it
	ExpiresAt time.Time

	keyID  string // of the authority
	status statuslist.Reference
}

func (w *WITSVID) ends() time.Time { return w.ExpiresAt }

// wit returns the WIT-SVID of a credential of that kind; nil if it has none
// that is valid.
func (c *credential) wit(now time.Time) *WITSVID {
	w, _ := c.valid(now).(*WITSVID)
	return w
}

// requestWIT has WIT-SVIDs signed.
func (h *Held) requestWIT(ctx context.Context, jobs []job) ([]answer, error) {
	requests := make([]WITRequest, len(jobs))
	for i, j := range jobs {
		public, err := x509.MarshalPKIXPublicKey(j.key.Public())
		if err != nil {
			return nil, fmt.Errorf("encode a public key: %w", err)
		}
		requests[i] = WITRequest{EntryID: j.entry.ID, PublicKey: public, Algorithm: string(witAlgorithm)}
	}
	results, err := h.signer.SignWIT(ctx, requests)
	if err != nil {
		return nil, err
	}
	answers := make([]answer, len(results))
	for i, r := range results[:min(len(results), len(jobs))] {
		if answers[i].err = r.Err; r.Err == nil {
			answers[i] = newWITSVID(jobs[i], r.Token)
		}
	}
	return answers, nil
}

// newWITSVID checks that a token is of the key and the SPIFFE ID asked for.
func newWITSVID(j job, token string) answer {
	fail := func(format string, args ...any) answer { return answer{err: fmt.Errorf(format, args...)} }
	svid, err := witsvid.ParseInsecure(token) // it came from the server, over a connection that proves it
	switch {
	case err != nil:
		return fail("the server sent what is no WIT-SVID: %w", err)
	case svid.ID != j.entry.SPIFFEID:
		return fail("the server sent a WIT-SVID of %s; the entry is of %s", svid.ID, j.entry.SPIFFEID)
	case !j.key.PublicKey.Equal(svid.PublicKey):
		return fail("the server sent a WIT-SVID of another key")
	}
	key, err := json.Marshal(jose.JSONWebKey{Key: j.key, Algorithm: string(witAlgorithm)})
	if err != nil {
		return fail("encode the key of the WIT-SVID: %w", err)
	}
	return answer{svid: &WITSVID{Token: token, Key: string(key), ExpiresAt: svid.Expiry, keyID: svid.KeyID, status: signatureOf(token).status}}
}

package issue

import (
	"context"
	"encoding/base64"
	"fmt"
	"strconv"
	"time"

	"github.com/hallmark-id/hallmark/pkg/statuslist"
	"github.com/hallmark-id/hallmark/server/authority"
)

// listLives is how many times its time to live a status list token is good for:
// a relying party that cannot fetch another may go by it for so long, if it
// chooses to.
const listLives = 10

// StatusList signs a status list with the active JWT authority: its URI, the
// statuses of one bit as they are sent, and how long it may be held before
// another is to be fetched, in whole seconds.
func (i *Issuer) StatusList(ctx context.Context, uri string, bits []byte, ttl time.Duration) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	s, err := i.jwtSigner(&i.list)
	if err != nil {
		return "", err
	}
	issued := i.now().Truncate(time.Second)
	expires := issued.Add(listLives * ttl)
	if end := s.ExpiresAt.Truncate(time.Second); expires.After(end) {
		expires = end
	}
	if !expires.After(issued) {
		return "", authority.ErrUnavailable
	}
	// draft-ietf-oauth-status-list §4.2, §5.1.
	b := make([]byte, 0, 256+base64.RawURLEncoding.EncodedLen(len(bits)))
	b = append(b, `{"sub":`...)
	b = appendString(b, uri)
	b = append(b, `,"iat":`...)
	b = strconv.AppendInt(b, issued.Unix(), 10)
	b = append(b, `,"exp":`...)
	b = strconv.AppendInt(b, expires.Unix(), 10)
	b = append(b, `,"ttl":`...)
	b = strconv.AppendInt(b, int64(ttl/time.Second), 10)
	b = append(b, `,"status_list":{"bits":1,"lst":"`...)
	b = base64.RawURLEncoding.AppendEncode(b, bits)
	b = append(b, `"}}`...)
	token, err := s.sign(b)
	if err != nil {
		return "", fmt.Errorf("sign the status list %s: %w", uri, err)
	}
	if len(token) > statuslist.MaxToken {
		return "", fmt.Errorf("the status list %s is %d bytes long; the most is %d", uri, len(token), statuslist.MaxToken)
	}
	s.signed.add(expires)
	return token, nil
}

package node

import (
	"context"
	"errors"
	"fmt"
	"time"

	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/agent/held"
)

var _ held.Signer = (*Node)(nil)

const (
	jwtTimeout = 10 * time.Second // someone waits for the answer
	maxToken   = 64 << 10         // bytes of a JWT-SVID or WIT-SVID

	// breakTime is how long after a call failed for its connection that one may
	// need to be known as broken.
	breakTime = 250 * time.Millisecond
)

// SignX509 has the server sign X509-SVIDs, at most [held.MaxBatch] in one call.
// A result's chain leads to the bundle that the node has, and its leaf is of
// the trust domain; whether it is for the key and the SPIFFE ID asked for is
// for the caller to check, who knows both. The call takes at most 30 seconds.
// Without a connection the error wraps [ErrUnavailable].
func (n *Node) SignX509(ctx context.Context, requests []held.X509Request) ([]held.X509Result, error) {
	if len(requests) == 0 {
		return nil, nil
	}
	if len(requests) > held.MaxBatch {
		return nil, fmt.Errorf("sign X509-SVIDs: %d in one call; the most is %d", len(requests), held.MaxBatch)
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	in := &svidv1.BatchNewX509SVIDRequest{}
	for _, r := range requests {
		in.Params = append(in.Params, &svidv1.NewX509SVIDParams{EntryId: r.EntryID, Csr: r.CSR})
	}
	var out *svidv1.BatchNewX509SVIDResponse
	err := n.call(ctx, func(ctx context.Context, conn grpc.ClientConnInterface) (err error) {
		out, err = svidv1.NewSVIDClient(conn).BatchNewX509SVID(ctx, in)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("sign X509-SVIDs: %w", err)
	}
	if len(out.Results) != len(requests) {
		return nil, fmt.Errorf("sign X509-SVIDs: server sent %d results for %d requests", len(out.Results), len(requests))
	}
	t := n.trusted()
	results := make([]held.X509Result, len(requests))
	for i, r := range out.Results {
		results[i] = n.x509Result(r, t)
	}
	return results, nil
}

func (n *Node) x509Result(r *svidv1.BatchNewX509SVIDResponse_Result, t *trust) held.X509Result {
	if code := codes.Code(r.GetStatus().GetCode()); code != codes.OK {
		return held.X509Result{Err: status.Error(code, r.GetStatus().GetMessage())}
	}
	fail := func(err error) held.X509Result { return held.X509Result{Err: err} }
	chain, err := parseChain(r.GetSvid().GetCertChain())
	if err != nil {
		return fail(err)
	}
	if _, err := n.verifySVID(chain, t); err != nil {
		return fail(err)
	}
	return held.X509Result{Chain: r.Svid.CertChain, ExpiresAt: chain[0].NotAfter}
}

// SignWIT has the server sign WIT-SVIDs, at most [held.MaxBatch] in one call.
// Whether a token is for the key and the SPIFFE ID asked for is for the caller
// to check. The call takes at most 30 seconds. Without a connection the error
// wraps [ErrUnavailable].
func (n *Node) SignWIT(ctx context.Context, requests []held.WITRequest) ([]held.WITResult, error) {
	if len(requests) == 0 {
		return nil, nil
	}
	if len(requests) > held.MaxBatch {
		return nil, fmt.Errorf("sign WIT-SVIDs: %d in one call; the most is %d", len(requests), held.MaxBatch)
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	in := &svidv1.BatchNewWITSVIDRequest{}
	for _, r := range requests {
		in.Params = append(in.Params, &svidv1.NewWITSVIDParams{EntryId: r.EntryID, PublicKey: r.PublicKey, SigningAlgorithm: r.Algorithm})
	}
	var out *svidv1.BatchNewWITSVIDResponse
	err := n.call(ctx, func(ctx context.Context, conn grpc.ClientConnInterface) (err error) {
		out, err = svidv1.NewSVIDClient(conn).BatchNewWITSVID(ctx, in)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("sign WIT-SVIDs: %w", err)
	}
	if len(out.Results) != len(requests) {
		return nil, fmt.Errorf("sign WIT-SVIDs: server sent %d results for %d requests", len(out.Results), len(requests))
	}
	results := make([]held.WITResult, len(requests))
	for i, r := range out.Results {
		token := r.GetSvid().GetToken()
		switch code := codes.Code(r.GetStatus().GetCode()); {
		case code != codes.OK:
			results[i].Err = status.Error(code, r.GetStatus().GetMessage())
		case len(token) > maxToken:
			results[i].Err = fmt.Errorf("server sent a WIT-SVID of %d bytes; the most is %d", len(token), maxToken)
		default:
			results[i].Token = token
		}
	}
	return results, nil
}

// SignJWT has the server sign a JWT-SVID of an entry. It takes at most ten
// seconds. Without a connection the error wraps [ErrUnavailable].
func (n *Node) SignJWT(ctx context.Context, entryID string, audience []string) (held.JWTResult, error) {
	ctx, cancel := context.WithTimeout(ctx, jwtTimeout)
	defer cancel()
	var out *svidv1.NewJWTSVIDResponse
	err := n.call(ctx, func(ctx context.Context, conn grpc.ClientConnInterface) (err error) {
		out, err = svidv1.NewSVIDClient(conn).NewJWTSVID(ctx, &svidv1.NewJWTSVIDRequest{EntryId: entryID, Audience: audience})
		return err
	})
	if err != nil {
		return held.JWTResult{}, fmt.Errorf("sign a JWT-SVID: %w", err)
	}
	s := out.GetSvid()
	result := held.JWTResult{Token: s.GetToken(), IssuedAt: time.Unix(s.GetIssuedAt(), 0), ExpiresAt: time.Unix(s.GetExpiresAt(), 0)}
	switch {
	case result.Token == "":
		return held.JWTResult{}, errors.New("sign a JWT-SVID: server sent none")
	case len(result.Token) > maxToken:
		return held.JWTResult{}, fmt.Errorf("sign a JWT-SVID: server sent one of %d bytes; the most is %d", len(result.Token), maxToken)
	case !result.ExpiresAt.After(n.o.Now()):
		return held.JWTResult{}, fmt.Errorf("sign a JWT-SVID: server sent one that expired at %s; compare the clocks of node and server", result.ExpiresAt.UTC().Format(time.RFC3339))
	}
	return result, nil
}

// call makes a call on the current link. If the link was replaced meanwhile
// (the server has seen the next SVID and lets go of this one, or it hangs and
// there is another), it makes the call once more on the new one.
func (n *Node) call(ctx context.Context, do func(context.Context, grpc.ClientConnInterface) error) error {
	for again := true; ; again = false {
		l, err := n.linkSoon(ctx)
		if err != nil {
			return err
		}
		err = l.do(ctx, do)
		if status.Code(err) == codes.Unavailable {
			l.ends(breakTime)
		}
		replaced := !l.alive()
		l.Release()
		if err == nil {
			return nil
		}
		if !replaced {
			l.Report(err)
			return err
		}
		switch code := status.Code(err); {
		case !again, ctx.Err() != nil, code != codes.PermissionDenied && code != codes.Unavailable && code != codes.Canceled:
			return err
		}
	}
}

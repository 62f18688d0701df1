package admin

import (
	"context"
	"math"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/debug/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
)

// debugService is SPIRE's agent Debug API.
type debugService struct {
	debugv1.UnsafeDebugServer // every call is here: one that is missing does not compile
	*Server
}

// GetInfo says what the agent holds. Nothing is held for SVID stores: their
// count is 0.
func (s *debugService) GetInfo(context.Context, *debugv1.GetInfoRequest) (*debugv1.GetInfoResponse, error) {
	c := s.o.Connection()
	_, svids := s.o.Held.Counts()
	info := &debugv1.GetInfoResponse{
		Uptime:               atMost32(int(s.o.Now().Sub(s.started) / time.Second)),
		CachedX509SvidsCount: atMost32(svids),
		CachedJwtSvidsCount:  atMost32(s.o.Held.CachedJWTs()),
	}
	//lint:ignore SA1019 SPIRE's older tools read this one
	info.SvidsCount = info.CachedX509SvidsCount
	if !c.SyncedAt.IsZero() {
		info.LastSyncSuccess = c.SyncedAt.Unix()
	}
	for _, x := range c.Chain {
		cert := &debugv1.GetInfoResponse_Cert{ExpiresAt: x.NotAfter.Unix(), Subject: x.Subject.String()}
		if len(x.URIs) > 0 {
			if id, err := spiffeid.FromURI(x.URIs[0]); err == nil {
				cert.Id = &types.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()}
			}
		}
		info.SvidChain = append(info.SvidChain, cert)
	}
	return info, nil
}

func atMost32(n int) int32 { return int32(min(n, math.MaxInt32)) }

package api

import (
	"context"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// healthService is gRPC's health check, of the server as a whole, which has the
// empty name.
type healthService struct {
	grpc_health_v1.UnsafeHealthServer
	*API
}

// watchEvery is how soon one that watches learns of a change.
const watchEvery = time.Second

// health reports whether the server can issue: it serves then.
func (s *healthService) health() grpc_health_v1.HealthCheckResponse_ServingStatus {
	if _, err := s.authorities.X509(); err != nil || s.authorities.KeysAvailable() != nil || s.stopping.Err() != nil {
		return grpc_health_v1.HealthCheckResponse_NOT_SERVING
	}
	return grpc_health_v1.HealthCheckResponse_SERVING
}

// Check reports the health now.
func (s *healthService) Check(_ context.Context, req *grpc_health_v1.HealthCheckRequest) (*grpc_health_v1.HealthCheckResponse, error) {
	if req.Service != "" {
		return nil, callErrorf(codes.NotFound, "there is no health of service %q; ask for that of the server, with an empty name", clip(req.Service))
	}
	return &grpc_health_v1.HealthCheckResponse{Status: s.health()}, nil
}

// List reports the health of all there is.
func (s *healthService) List(context.Context, *grpc_health_v1.HealthListRequest) (*grpc_health_v1.HealthListResponse, error) {
	return &grpc_health_v1.HealthListResponse{
		Statuses: map[string]*grpc_health_v1.HealthCheckResponse{"": {Status: s.health()}},
	}, nil
}

// Watch reports the health now and whenever it changes, until the caller goes
// or the server stops. Of a service that is not there it says so and waits, as
// gRPC demands.
func (s *healthService) Watch(req *grpc_health_v1.HealthCheckRequest, stream grpc_health_v1.Health_WatchServer) error {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	told := grpc_health_v1.HealthCheckResponse_UNKNOWN
	for {
		now := grpc_health_v1.HealthCheckResponse_SERVICE_UNKNOWN
		if req.Service == "" {
			now = s.health()
		}
		if now != told {
			if err := stream.Send(&grpc_health_v1.HealthCheckResponse{Status: now}); err != nil {
				return err
			}
			told = now
		}
		select {
		case <-tick.C:
		case <-stream.Context().Done():
			return context.Cause(stream.Context())
		}
	}
}

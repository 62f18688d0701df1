package admin

import (
	"context"

	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/logger/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/pkg/peercred"
)

// loggerService is SPIRE's agent Logger API over the level of the agent's log.
type loggerService struct {
	loggerv1.UnsafeLoggerServer // every call is here: one that is missing does not compile
	*Server
}

// GetLogger returns the level as it is and as it is configured.
func (s *loggerService) GetLogger(context.Context, *loggerv1.GetLoggerRequest) (*types.Logger, error) {
	return s.o.LogLevel.Logger(), nil
}

// SetLogLevel sets the level, until it is reset or the agent ends.
func (s *loggerService) SetLogLevel(ctx context.Context, req *loggerv1.SetLogLevelRequest) (*types.Logger, error) {
	logger, err := s.o.LogLevel.Set(req.NewLevel)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	s.changed(ctx, logger)
	return logger, nil
}

// ResetLogLevel sets the level to the configured one.
func (s *loggerService) ResetLogLevel(ctx context.Context, _ *loggerv1.ResetLogLevelRequest) (*types.Logger, error) {
	logger := s.o.LogLevel.Reset()
	s.changed(ctx, logger)
	return logger, nil
}

func (s *loggerService) changed(ctx context.Context, now *types.Logger) {
	attrs := []any{"level", now.CurrentLevel.String()}
	if p, err := peercred.FromContext(ctx); err == nil {
		attrs = append(attrs, "pid", p.PID, "uid", p.UID)
	}
	s.o.Log.Info("the log level was set", attrs...)
}

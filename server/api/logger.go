package api

import (
	"context"

	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/logger/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/hallmark-id/hallmark/pkg/loglevel"
)

// loggerService is SPIRE's Logger API over the level of the server's log.
type loggerService struct {
	loggerv1.UnsafeLoggerServer // every call is here: one that is missing does not compile
	level                       *loglevel.Var
}

// GetLogger returns the level as it is and as it is configured.
func (s *loggerService) GetLogger(context.Context, *loggerv1.GetLoggerRequest) (*types.Logger, error) {
	return s.level.Logger(), nil
}

// SetLogLevel sets the level, until it is reset or the server ends.
func (s *loggerService) SetLogLevel(_ context.Context, req *loggerv1.SetLogLevelRequest) (*types.Logger, error) {
	logger, err := s.level.Set(req.NewLevel)
	if err != nil {
		return nil, invalidArgument("%v", err)
	}
	return logger, nil
}

// ResetLogLevel sets the level to the configured one.
func (s *loggerService) ResetLogLevel(context.Context, *loggerv1.ResetLogLevelRequest) (*types.Logger, error) {
	return s.level.Reset(), nil
}

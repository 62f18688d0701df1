package server

import (
	"context"
	"log/slog"
	"strings"

	"github.com/hallmark-id/hallmark/pkg/config"
	"github.com/hallmark-id/hallmark/pkg/loglevel"
	"github.com/hallmark-id/hallmark/server/api"
)

// follow takes over what can be changed while the server runs, each time its
// configuration is to be read again: log.level and limits.
func (s *settings) follow(ctx context.Context, src config.Source, served *api.API, level *loglevel.Var, log *slog.Logger) {
	running := s.Config
	config.Follow(ctx, src, log, func(src config.Source) (applied, restart []config.Difference, err error) {
		fresh, err := load(src)
		if err != nil {
			return nil, nil, err
		}
		configured, err := fresh.Log.ParseLevel()
		if err != nil {
			return nil, nil, err
		}
		for _, d := range config.Diff(running, fresh.Config) {
			switch {
			case d.Path == "log.level":
				level.Configure(configured)
			case !strings.HasPrefix(d.Path, "limits."):
				restart = append(restart, d)
				continue
			}
			applied = append(applied, d)
		}
		served.SetLimits(fresh.Limits.api())
		running.Log.Level, running.Limits = fresh.Log.Level, fresh.Limits
		return applied, restart, nil
	})
}

func (l LimitsConfig) api() api.Limits {
	return api.Limits{
		Connections:     l.Connections,
		CallsPerSecond:  l.CallsPerSecond,
		AttestPerSecond: l.AttestPerSecond,
		SignPerSecond:   l.SignPerSecond,
	}
}

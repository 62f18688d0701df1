package agent

import (
	"context"
	"log/slog"
	"strings"

	"github.com/hallmark-id/hallmark/agent/endpoint"
	"github.com/hallmark-id/hallmark/pkg/config"
	"github.com/hallmark-id/hallmark/pkg/loglevel"
)

// follow takes over what can be changed while the agent runs, each time its
// configuration is to be read again: log.level and limits.
func (s *settings) follow(ctx context.Context, src config.Source, setLimits func(endpoint.Limits), level *loglevel.Var, log *slog.Logger) {
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
		setLimits(fresh.Limits.endpoint())
		running.Log.Level, running.Limits = fresh.Log.Level, fresh.Limits
		return applied, restart, nil
	})
}

// Package loglevel is the level of a running program's log, which an operator
// may change: through SPIRE's Logger APIs of server and agent, or by having the
// configuration read again. Its type is [Var].
//
// SPIRE's levels stand for those of log/slog like this:
//
//	SPIRE                   log/slog
//	TRACE                   DEBUG-4   (we log nothing below DEBUG)
//	DEBUG INFO WARN ERROR   DEBUG INFO WARN ERROR
//	FATAL                   ERROR+4   (we log nothing above ERROR: silent)
//	PANIC                   ERROR+8   (likewise)
package loglevel

import (
	"fmt"
	"log/slog"
	"sync"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
)

// levels are SPIRE's, the most talkative first.
var levels = []struct {
	spire types.LogLevel
	slog  slog.Level
}{
	{types.LogLevel_TRACE, slog.LevelDebug - 4},
	{types.LogLevel_DEBUG, slog.LevelDebug},
	{types.LogLevel_INFO, slog.LevelInfo},
	{types.LogLevel_WARN, slog.LevelWarn},
	{types.LogLevel_ERROR, slog.LevelError},
	{types.LogLevel_FATAL, slog.LevelError + 4},
	{types.LogLevel_PANIC, slog.LevelError + 8},
}

// Var is the level of a log. It implements [slog.Leveler]; all methods may be
// called concurrently. Make one with [New].
type Var struct {
	level slog.LevelVar

	mu         sync.Mutex
	configured slog.Level
}

// New makes a Var with the level that is configured.
func New(configured slog.Level) *Var {
	v := &Var{configured: configured}
	v.level.Set(configured)
	return v
}

// Level returns the level as it is now.
func (v *Var) Level() slog.Level { return v.level.Level() }

// Configure sets the level, and what [Var.Reset] goes back to.
func (v *Var) Configure(level slog.Level) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.configured = level
	v.level.Set(level)
}

// Reset sets the level to the one that is configured, and returns how it is
// then.
func (v *Var) Reset() *types.Logger {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.level.Set(v.configured)
	return v.logger()
}

// Set sets the level to one of SPIRE's, and returns how it is then. It fails
// if there is no such level.
func (v *Var) Set(level types.LogLevel) (*types.Logger, error) {
	if level == types.LogLevel_UNSPECIFIED {
		return nil, fmt.Errorf("set the log level: new_level is missing; it is one of PANIC, FATAL, ERROR, WARN, INFO, DEBUG and TRACE")
	}
	for _, l := range levels {
		if l.spire == level {
			v.mu.Lock()
			defer v.mu.Unlock()
			v.level.Set(l.slog)
			return v.logger(), nil
		}
	}
	return nil, fmt.Errorf("set the log level: there is no level %d; it is one of PANIC, FATAL, ERROR, WARN, INFO, DEBUG and TRACE", level)
}

// Logger returns how the level is, as SPIRE has it.
func (v *Var) Logger() *types.Logger {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.logger()
}

func (v *Var) logger() *types.Logger {
	return &types.Logger{CurrentLevel: toSPIRE(v.level.Level()), LaunchLevel: toSPIRE(v.configured)}
}

// toSPIRE returns the most talkative level that logs nothing more.
func toSPIRE(level slog.Level) types.LogLevel {
	for _, l := range levels {
		if level <= l.slog {
			return l.spire
		}
	}
	return types.LogLevel_PANIC
}

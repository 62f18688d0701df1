package loglevel_test

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/hallmark-id/hallmark/pkg/loglevel"
)

func TestEveryLevelIsSetAndToldAgain(t *testing.T) {
	v := loglevel.New(slog.LevelInfo)
	for name, want := range map[string]slog.Level{
		"PANIC": slog.LevelError + 8, "FATAL": slog.LevelError + 4, "ERROR": slog.LevelError, "WARN": slog.LevelWarn,
		"INFO": slog.LevelInfo, "DEBUG": slog.LevelDebug, "TRACE": slog.LevelDebug - 4,
	} {
		level := types.LogLevel(types.LogLevel_value[name])
		got, err := v.Set(level)
		if err != nil || got.CurrentLevel != level || got.LaunchLevel != types.LogLevel_INFO || v.Level() != want {
			t.Errorf("%s: %v, %v, level %v", name, got, err, v.Level())
		}
	}
}

func TestALevelThatDoesNotExistChangesNothing(t *testing.T) {
	v := loglevel.New(slog.LevelWarn)
	for _, level := range []types.LogLevel{types.LogLevel_UNSPECIFIED, -1, 8} {
		if _, err := v.Set(level); err == nil || v.Level() != slog.LevelWarn {
			t.Errorf("%v: %v, level %v", level, err, v.Level())
		}
	}
}

func TestAResetGoesBackToWhatIsConfigured(t *testing.T) {
	var b bytes.Buffer
	v := loglevel.New(slog.LevelInfo)
	log := slog.New(slog.NewTextHandler(&b, &slog.HandlerOptions{Level: v}))
	log.Debug("one")
	v.Set(types.LogLevel_DEBUG)
	log.Debug("two")
	v.Reset()
	log.Debug("three")
	v.Configure(slog.LevelDebug)
	v.Set(types.LogLevel_ERROR)
	log.Info("four")
	if got := v.Reset(); got.CurrentLevel != types.LogLevel_DEBUG || got.LaunchLevel != types.LogLevel_DEBUG {
		t.Errorf("got %v", got)
	}
	log.Debug("five")
	if got := b.String(); strings.Count(got, "\n") != 2 || !strings.Contains(got, "two") || !strings.Contains(got, "five") {
		t.Errorf("logged\n%s", got)
	}
}

package cluster

import (
	"context"
	"log/slog"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// etcdLog has etcd log to our log. What it says of its own course, warns of and
// calls an error is detail to us: servers that are away and writes that fail are
// told of elsewhere. What it cannot live with ends the process. What lasts is
// said once a minute.
func etcdLog(log *slog.Logger) *zap.Logger {
	return zap.New(zapcore.NewSamplerWithOptions(&zapToSlog{log: log.With("component", "etcd")}, time.Minute, 1, 0))
}

type zapToSlog struct{ log *slog.Logger }

func slogLevel(l zapcore.Level) slog.Level {
	if l > zapcore.ErrorLevel {
		return slog.LevelError
	}
	return slog.LevelDebug
}

// Enabled implements [zapcore.LevelEnabler].
func (z *zapToSlog) Enabled(l zapcore.Level) bool {
	return z.log.Enabled(context.Background(), slogLevel(l))
}

// With implements [zapcore.Core].
func (z *zapToSlog) With(fields []zapcore.Field) zapcore.Core {
	return &zapToSlog{log: z.log.With(attrs(fields)...)}
}

// Check implements [zapcore.Core].
func (z *zapToSlog) Check(e zapcore.Entry, c *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if z.Enabled(e.Level) {
		return c.AddCore(e, z)
	}
	return c
}

// Write implements [zapcore.Core].
func (z *zapToSlog) Write(e zapcore.Entry, fields []zapcore.Field) error {
	z.log.Log(context.Background(), slogLevel(e.Level), e.Message, attrs(fields)...)
	return nil
}

// Sync implements [zapcore.Core].
func (z *zapToSlog) Sync() error { return nil }

func attrs(fields []zapcore.Field) []any {
	m := zapcore.NewMapObjectEncoder()
	for _, f := range fields {
		f.AddTo(m)
	}
	var out []any
	for k, v := range m.Fields {
		out = append(out, slog.Any(k, v))
	}
	return out
}

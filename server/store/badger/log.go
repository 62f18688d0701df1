package badger

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
)

// logger passes badger's log on. Its news of files opened and tables compacted
// is for those who look for something; its debug log has a line for each write
// and is dropped.
type logger struct{ to *slog.Logger }

func (l logger) log(level slog.Level, format string, args []any) {
	if l.to.Enabled(context.Background(), level) {
		l.to.Log(context.Background(), level, "badger: "+strings.TrimSpace(fmt.Sprintf(format, args...)))
	}
}

func (l logger) Errorf(format string, args ...any)   { l.log(slog.LevelError, format, args) }
func (l logger) Warningf(format string, args ...any) { l.log(slog.LevelWarn, format, args) }
func (l logger) Infof(format string, args ...any)    { l.log(slog.LevelDebug, format, args) }
func (l logger) Debugf(string, ...any)               {}

package plugin

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strings"

	"golang.org/x/time/rate"

	"github.com/hallmark-id/hallmark/attestors"
)

// Bounds of a plugin's log.
const (
	maxLine   = 8 << 10 // bytes; the rest of a line is left out
	maxText   = 2 << 10 // bytes of a message
	maxFields = 16
	lines     = rate.Limit(20) // a second
	linesOnce = 200
)

// relay logs what a plugin writes to its standard error, until that ends. Lines
// above the bounds are counted and left out.
func relay(r io.Reader, log *slog.Logger) {
	in := bufio.NewReaderSize(r, maxLine)
	allowed, left := rate.NewLimiter(lines, linesOnce), 0
	tell := func() {
		if left > 0 {
			log.Warn("plugin wrote more than is logged", "lines_left_out", left)
			left = 0
		}
	}
	defer tell()
	for cut := false; ; {
		line, prefix, err := in.ReadLine()
		if err != nil {
			return
		}
		first := !cut
		cut = prefix
		switch {
		case !first || len(line) == 0: // the rest of one that is too long
		case !allowed.Allow():
			left++
		default:
			tell()
			level, message, fields := parseLine(line)
			log.LogAttrs(context.Background(), level, "plugin: "+message, fields...)
		}
	}
}

// parseLine reads a line of a log: the JSON of hclog, which SPIRE's SDK writes,
// or text.
func parseLine(line []byte) (slog.Level, string, []slog.Attr) {
	var entry map[string]any
	if json.Unmarshal(line, &entry) != nil || entry["@message"] == nil {
		return slog.LevelInfo, bounded(string(line)), nil
	}
	level := slog.LevelInfo
	switch entry["@level"] {
	case "trace", "debug":
		level = slog.LevelDebug
	case "warn":
		level = slog.LevelWarn
	case "error":
		level = slog.LevelError
	}
	message := bounded(fmt.Sprint(entry["@message"]))
	var fields []any
	for _, name := range slices.Sorted(maps.Keys(entry)) {
		if !strings.HasPrefix(name, "@") && len(fields) < maxFields {
			fields = append(fields, slog.String(attestors.Clip(strings.ToValidUTF8(name, "?")), bounded(fmt.Sprint(entry[name]))))
		}
	}
	if fields == nil {
		return level, message, nil
	}
	// In a group of their own they cannot pass for Hallmark's fields.
	return level, message, []slog.Attr{slog.Group("said", fields...)}
}

func bounded(text string) string {
	if len(text) > maxText {
		text = text[:maxText] + "…"
	}
	return strings.ToValidUTF8(text, "?")
}

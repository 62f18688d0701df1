package config

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"strconv"
	"strings"
	"time"
)

// Duration is a length of time in a configuration, written like 1h30m or 30d:
// never negative, a day is 24 hours.
type Duration time.Duration

// ParseDuration reads the text form of a [Duration].
func ParseDuration(text string) (Duration, error) {
	if text == "" {
		return 0, errors.New("a duration is missing; write one like 1h30m")
	}
	if _, err := strconv.ParseFloat(text, 64); err == nil && text != "0" {
		return 0, fmt.Errorf("duration %q has no unit; write %ss, %sm, %sh or %sd", text, text, text, text, text)
	}
	if strings.HasPrefix(text, "-") {
		return 0, fmt.Errorf("duration %q is negative", text)
	}
	var total time.Duration
	rest := text
	if days, after, ok := strings.Cut(text, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 32)
		if err != nil || n > uint64(math.MaxInt64/(24*time.Hour)) {
			return 0, fmt.Errorf("%q is no duration; write one like 1h30m or 30d", shorten(text))
		}
		total, rest = time.Duration(n)*24*time.Hour, after
	}
	if rest != "" || total == 0 {
		d, err := time.ParseDuration(strings.TrimPrefix(rest, "+"))
		if rest == "" { // 0d
			d, err = 0, nil
		}
		if err != nil || d < 0 || d > math.MaxInt64-total {
			return 0, fmt.Errorf("%q is no duration; write one like 1h30m or 30d", shorten(text))
		}
		total += d
	}
	return Duration(total), nil
}

// Pattern is the regular expression of what [ParseDuration] reads, as JSON
// Schema wants it; it does not know which durations are too long.
func (Duration) Pattern() string {
	const number, unit = `([0-9]+([.][0-9]*)?|[.][0-9]+)`, `(ns|us|µs|μs|ms|s|m|h)`
	return `^0$|^[0-9]+d([+]?0)?$|^([0-9]+d)?[+]?(` + number + unit + `)+$`
}

// UnmarshalText reads the text form.
func (d *Duration) UnmarshalText(text []byte) error {
	parsed, err := ParseDuration(string(text))
	if err == nil {
		*d = parsed
	}
	return err
}

// MarshalText writes the text form, for example 1h30m.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// String returns the text form, without units that are zero: 1h30m, 30d.
func (d Duration) String() string {
	if d == 0 {
		return "0s"
	}
	t := time.Duration(d)
	var days string
	if n := t / (24 * time.Hour); n > 1 {
		days, t = strconv.FormatInt(int64(n), 10)+"d", t%(24*time.Hour)
	}
	if t == 0 {
		return days
	}
	s := t.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return days + s
}

// Log says what is logged, and how.
type Log struct {
	// Level is the least urgent event that is logged: debug, info, warn or error.
	// Default info.
	Level string `yaml:"level" oneof:"debug,info,warn,error"`
	// Format is text, for people, or json, for machines. Default text.
	Format string `yaml:"format" oneof:"text,json"`
}

// Logger makes the logger that writes to w.
func (l Log) Logger(w io.Writer) (*slog.Logger, error) {
	level, err := l.ParseLevel()
	if err != nil {
		return nil, err
	}
	return l.LoggerAt(w, level)
}

// ParseLevel returns the level, info if there is none.
func (l Log) ParseLevel() (slog.Level, error) {
	switch l.Level {
	case "debug":
		return slog.LevelDebug, nil
	case "", "info":
		return slog.LevelInfo, nil
	case "warn":
		return slog.LevelWarn, nil
	case "error":
		return slog.LevelError, nil
	}
	return 0, fmt.Errorf("log level cannot be %q; %s", l.Level, choose(l.Level, []string{"debug", "info", "warn", "error"}))
}

// LoggerAt makes the logger that writes to w, with a level that may change while
// it is in use.
func (l Log) LoggerAt(w io.Writer, level slog.Leveler) (*slog.Logger, error) {
	options := slog.HandlerOptions{Level: level}
	switch l.Format {
	case "", "text":
		return slog.New(slog.NewTextHandler(w, &options)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, &options)), nil
	}
	return nil, fmt.Errorf("log format cannot be %q; it is text or json", l.Format)
}

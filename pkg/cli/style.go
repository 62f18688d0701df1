package cli

import (
	"fmt"
	"os"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/term"
)

// style is how text is set off on one output; off a terminal, not at all.
type style struct{ on bool }

// styleOf respects NO_COLOR (no-color.org) and dumb terminals.
func styleOf(f *os.File) style {
	return style{on: os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb" && term.IsTerminal(int(f.Fd()))}
}

func (s style) paint(code, text string) string {
	if !s.on || text == "" {
		return text
	}
	return "\x1b[" + code + "m" + strings.ReplaceAll(text, "\n", "\x1b[0m\n\x1b["+code+"m") + "\x1b[0m"
}

func (s style) bold(text string) string   { return s.paint("1", text) }
func (s style) dim(text string) string    { return s.paint("2", text) }
func (s style) red(text string) string    { return s.paint("31", text) }
func (s style) green(text string) string  { return s.paint("32", text) }
func (s style) yellow(text string) string { return s.paint("33", text) }
func (s style) cyan(text string) string   { return s.paint("36", text) }

// printable replaces control characters, which a name from elsewhere could use
// to redraw the terminal.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if r == '\n' || r < ' ' || r == 0x7f || (r >= 0x80 && r < 0xa0) || r == utf8.RuneError {
			return '�'
		}
		return r
	}, text)
}

// table lays out rows of cells in columns. A cell may have several lines.
type table struct {
	style  style
	header []string
	rows   [][]cell
}

type cell struct {
	lines []string
	paint func(string) string // nil: plain
}

func text(lines ...string) cell { return cell{lines: lines} }

func painted(paint func(string) string, lines ...string) cell { return cell{lines, paint} }

func (t *table) add(cells ...cell) { t.rows = append(t.rows, cells) }

// String lays the table out. Columns are as wide as their widest cell, the
// last one is ragged; a column without any content is left out.
func (t *table) String() string {
	const gap = 2
	widths := make([]int, len(t.header))
	for _, row := range t.rows {
		for i, c := range row {
			for _, line := range c.lines {
				widths[i] = max(widths[i], utf8.RuneCountInString(printable(line)))
			}
		}
	}
	last := 0
	for i, w := range widths {
		if w > 0 {
			widths[i] = max(w, utf8.RuneCountInString(t.header[i]))
			last = i
		}
	}
	var b strings.Builder
	line := func(at func(column int) (string, func(string) string)) {
		var out strings.Builder
		pending := 0 // spaces, written only before something
		for i, w := range widths {
			if w == 0 {
				continue
			}
			value, paint := at(i)
			value = printable(value)
			length := utf8.RuneCountInString(value)
			if length > 0 {
				out.WriteString(strings.Repeat(" ", pending))
				pending = 0
				if paint != nil {
					value = paint(value)
				}
				out.WriteString(value)
			}
			if i != last {
				pending += w - length + gap
			}
		}
		b.WriteString(out.String())
		b.WriteByte('\n')
	}
	line(func(i int) (string, func(string) string) { return t.header[i], t.style.dim })
	for _, row := range t.rows {
		height := 1
		for _, c := range row {
			height = max(height, len(c.lines))
		}
		for y := range height {
			line(func(i int) (string, func(string) string) {
				if i < len(row) && y < len(row[i].lines) {
					return row[i].lines[y], row[i].paint
				}
				return "", nil
			})
		}
	}
	return b.String()
}

// details lays out one thing: names at the left, values at the right.
type details struct {
	style style
	items []detail
}

type detail struct {
	name  string
	value cell
}

// add adds a line for each of the values; nothing if there are none.
func (d *details) add(name string, values ...string) {
	if len(values) > 0 && (len(values) > 1 || values[0] != "") {
		d.items = append(d.items, detail{name, text(values...)})
	}
}

func (d *details) addPainted(name string, paint func(string) string, value string) {
	d.items = append(d.items, detail{name, painted(paint, value)})
}

func (d *details) String() string {
	width := 0
	for _, i := range d.items {
		width = max(width, utf8.RuneCountInString(i.name))
	}
	var b strings.Builder
	for _, i := range d.items {
		name := i.name
		for _, line := range i.value.lines {
			pad := strings.Repeat(" ", width-utf8.RuneCountInString(name)+2)
			line = printable(line)
			if i.value.paint != nil {
				line = i.value.paint(line)
			}
			fmt.Fprintf(&b, "  %s%s%s\n", d.style.dim(name), pad, line)
			name = ""
		}
	}
	return b.String()
}

// moment shows a time as RFC 3339 in UTC, and how far away it is.
func (a *app) moment(t time.Time) string {
	if t.IsZero() || t.Unix() == 0 {
		return "never"
	}
	return fmt.Sprintf("%s (%s)", t.UTC().Format(time.RFC3339), a.relative(t))
}

// relative says how far a time is from now: "in 59m", "3d 4h ago".
func (a *app) relative(t time.Time) string {
	if t.IsZero() || t.Unix() == 0 {
		return "never"
	}
	d := t.Sub(a.now()).Round(time.Second)
	switch {
	case d > 0:
		return "in " + span(d)
	case d < 0:
		return span(-d) + " ago"
	}
	return "now"
}

// span shows a length of time in its two largest units, rounded.
func span(d time.Duration) string {
	const day = 24 * time.Hour
	two := func(n time.Duration, unit string, m time.Duration, small string) string {
		if m == 0 {
			return fmt.Sprintf("%d%s", n, unit)
		}
		return fmt.Sprintf("%d%s %d%s", n, unit, m, small)
	}
	switch { // what rounds up to the next unit belongs there
	case d >= day-30*time.Minute:
		d = d.Round(time.Hour)
	case d >= time.Hour-30*time.Second:
		d = d.Round(time.Minute)
	}
	switch {
	case d >= day:
		return two(d/day, "d", d%day/time.Hour, "h")
	case d >= time.Hour:
		return two(d/time.Hour, "h", d%time.Hour/time.Minute, "m")
	case d >= time.Minute:
		return two(d/time.Minute, "m", d%time.Minute/time.Second, "s")
	case d >= time.Second:
		return fmt.Sprintf("%ds", d/time.Second)
	}
	return d.Round(time.Millisecond).String()
}

// count writes a number of things: "1 entry", "12,000 entries".
func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return thousands(n) + " " + many
}

func thousands(n int) string {
	s := fmt.Sprint(n)
	for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

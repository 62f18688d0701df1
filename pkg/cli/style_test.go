package cli

import (
	"strings"
	"testing"
	"time"
)

func TestSpanShowsTwoUnitsRounded(t *testing.T) {
	for want, d := range map[string]time.Duration{
		"250ms": 250 * time.Millisecond, "1s": time.Second, "59s": 59 * time.Second, "1m": time.Minute, "59m 20s": 59*time.Minute + 20*time.Second,
		"1h": 59*time.Minute + 45*time.Second, "1h 1m": time.Hour + 40*time.Second, "23h 29m": 23*time.Hour + 29*time.Minute,
		"1d": 23*time.Hour + 59*time.Minute, "6d 3h": 147 * time.Hour, "30d": 30*24*time.Hour - time.Second,
	} {
		if got := span(d); got != want {
			t.Errorf("%v: got %q, want %q", d, got, want)
		}
	}
}

func TestTablesAlignWhateverTheirCellsHold(t *testing.T) {
	tab := table{style: style{on: true}, header: []string{"A", "EMPTY", "LONG HEADER", "LAST"}}
	tab.add(painted(style{on: true}.bold, "ä"), cell{}, text("x", "y"), text("end"))
	tab.add(text("wide cell"), cell{}, text("\x1b[2J"), cell{})
	want := "" +
		"\x1b[2mA\x1b[0m          \x1b[2mLONG HEADER\x1b[0m  \x1b[2mLAST\x1b[0m\n" +
		"\x1b[1mä\x1b[0m          x            end\n" +
		"           y\n" +
		"wide cell  �[2J\n"
	if got := tab.String(); got != want {
		t.Errorf("got\n%q\nwant\n%q", got, want)
	}
}

func TestThereIsNoColourWithoutATerminal(t *testing.T) {
	if got := (style{}).red("x") + (style{}).bold("y"); strings.Contains(got, "\x1b") {
		t.Errorf("got %q", got)
	}
}

func TestThousandsAreSetApart(t *testing.T) {
	for n, want := range map[int]string{0: "0", 999: "999", 1000: "1,000", 1234567: "1,234,567", -1000: "-1,000"} {
		if got := thousands(n); got != want {
			t.Errorf("%d: got %q, want %q", n, got, want)
		}
	}
}

// Package sizing is what a measurement of a server is asked for and what it
// finds: a [Plan] and a [Report].
//
// A report has figures at several sizes, so that it shows how cost grows.
// [Report.SVG] draws it.
package sizing

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"time"
)

// Bounds of a [Plan].
const (
	MaxSize    = 10_000_000
	MaxSamples = 100_000
)

// Plan is what to measure.
type Plan struct {
	// Sizes are the numbers of entries or agents to measure at, ascending.
	Sizes []int
	// Samples is how many changes are timed at each size.
	Samples int
	// Idle is how long nothing happens while the cost of that is measured.
	Idle time.Duration

	// AdminSocket is that of the server to measure. Empty: one that is started
	// for the measurement, by Binary, and keeps its data below Dir.
	AdminSocket string
	Binary      string
	Dir         string

	// Note tells the operator what is being done. It may be called from several
	// goroutines.
	Note func(string)
}

// Check returns an error that names what cannot be meant.
func (p Plan) Check() error {
	switch {
	case len(p.Sizes) == 0:
		return fmt.Errorf("no size to measure at")
	case !slices.IsSorted(p.Sizes) || p.Sizes[0] < 1 || p.Sizes[len(p.Sizes)-1] > MaxSize:
		return fmt.Errorf("sizes must be between 1 and %d, the smallest first", MaxSize)
	case len(slices.Compact(slices.Clone(p.Sizes))) != len(p.Sizes):
		return fmt.Errorf("a size is named twice")
	case p.Samples < 1 || p.Samples > MaxSamples:
		return fmt.Errorf("samples must be between 1 and %d", MaxSamples)
	case p.Idle < 0 || p.Idle > time.Hour:
		return fmt.Errorf("idle must be between 0 and 1h")
	}
	return nil
}

// Report is what was measured.
type Report struct {
	Subject string   `json:"subject"` // what the sizes count: entries or agents
	Machine string   `json:"machine"` // for example: 2 CPUs, linux/amd64
	Version string   `json:"version"` // of Hallmark
	Sizes   []int    `json:"sizes"`
	Figures []Figure `json:"figures"`
}

// Figure is one thing that was measured, in one unit.
type Figure struct {
	Title string `json:"title"`
	Unit  string `json:"unit"`
	Lines []Line `json:"lines"`
}

// Line is a value at each of the report's sizes.
type Line struct {
	Name   string    `json:"name"`
	Values []float64 `json:"values"`
}

// Add adds the value of the report's next size to a line, which it makes if it
// is not there.
func (r *Report) Add(title, unit, line string, value float64) {
	i := slices.IndexFunc(r.Figures, func(f Figure) bool { return f.Title == title })
	if i < 0 {
		i = len(r.Figures)
		r.Figures = append(r.Figures, Figure{Title: title, Unit: unit})
	}
	f := &r.Figures[i]
	j := slices.IndexFunc(f.Lines, func(l Line) bool { return l.Name == line })
	if j < 0 {
		j = len(f.Lines)
		f.Lines = append(f.Lines, Line{Name: line})
	}
	f.Lines[j].Values = append(f.Lines[j].Values, value)
}

// Cut leaves of a report what was measured at its first n sizes.
func (r *Report) Cut(n int) {
	r.Sizes = r.Sizes[:n:n]
	for i := range r.Figures {
		for j := range r.Figures[i].Lines {
			l := &r.Figures[i].Lines[j]
			l.Values = l.Values[:min(n, len(l.Values))]
		}
	}
}

// AddTimes adds the median, the 99th percentile and the largest of some times,
// in milliseconds.
func (r *Report) AddTimes(title string, times []time.Duration) {
	for _, q := range []struct {
		name string
		at   float64
	}{{"p50", 0.50}, {"p99", 0.99}, {"max", 1}} {
		r.Add(title, "ms", q.name, float64(Quantile(times, q.at))/float64(time.Millisecond))
	}
}

// Quantile returns the smallest of some times that a part q (0 to 1) of them
// does not exceed; 0 if there are none.
func Quantile(times []time.Duration, q float64) time.Duration {
	if len(times) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(times))
	return sorted[max(0, int(math.Ceil(q*float64(len(sorted))))-1)]
}

// Format writes a value with three significant digits, or all of those before
// the point.
func Format(v float64) string {
	if math.IsNaN(v) || math.IsInf(v, 0) {
		return "-"
	}
	decimals := 0
	for m := math.Abs(v); m > 0 && m < 100 && decimals < 3; m *= 10 {
		decimals++
	}
	return strconv.FormatFloat(v, 'f', decimals, 64)
}

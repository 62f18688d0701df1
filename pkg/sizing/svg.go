package sizing

import (
	"bufio"
	"fmt"
	"html"
	"io"
	"math"
	"strings"
)

// The picture, in its own units.
const (
	plotWidth, plotHeight = 360, 190 // of one figure's axes
	marginLeft            = 64
	marginTop             = 44
	marginRight           = 24
	marginBottom          = 62 // sizes, and the names of the lines
	columns               = 2
	headHeight            = 56
)

var lineColors = []string{"#2563eb", "#d97706", "#059669", "#7c3aed", "#dc2626", "#475569"}

// SVG draws the report: one plot a figure, the sizes on a logarithmic scale.
func (r *Report) SVG(w io.Writer) error {
	b := bufio.NewWriter(w)
	cellWidth, cellHeight := marginLeft+plotWidth+marginRight, marginTop+plotHeight+marginBottom
	rows := (len(r.Figures) + columns - 1) / columns
	width, height := columns*cellWidth, headHeight+rows*cellHeight
	fmt.Fprintf(b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" font-family="system-ui, sans-serif" font-size="12">`+"\n",
		width, height, width, height)
	fmt.Fprintf(b, `<rect width="%d" height="%d" fill="#ffffff"/>`+"\n", width, height)
	label(b, 20, 26, "start", "16", "#0f172a", "Cost by number of "+r.Subject)
	label(b, 20, 44, "start", "12", "#64748b", r.Machine+" · Hallmark "+r.Version)
	for i, f := range r.Figures {
		fmt.Fprintf(b, `<g transform="translate(%d %d)">`+"\n", i%columns*cellWidth+marginLeft, headHeight+i/columns*cellHeight+marginTop)
		r.plot(b, f)
		fmt.Fprint(b, "</g>\n")
	}
	fmt.Fprint(b, "</svg>\n")
	return b.Flush()
}

// plot draws one figure. The origin is the upper left corner of its axes.
func (r *Report) plot(b io.Writer, f Figure) {
	label(b, -marginLeft+20, -18, "start", "13", "#0f172a", f.Title+", "+f.Unit)
	top, step := scale(f)
	y := func(v float64) float64 { return plotHeight * (1 - v/top) }
	for v := 0.0; v <= top*1.001; v += step {
		fmt.Fprintf(b, `<line x1="0" x2="%d" y1="%.1f" y2="%.1f" stroke="#e2e8f0"/>`+"\n", plotWidth, y(v), y(v))
		label(b, -8, y(v)+4, "end", "11", "#64748b", short(v))
	}
	for i, n := range r.Sizes {
		label(b, r.x(i), plotHeight+18, "middle", "11", "#64748b", short(float64(n)))
	}
	const nameWidth, namesAcross = plotWidth / 3, 3
	for i, l := range f.Lines {
		color := lineColors[i%len(lineColors)]
		var points []string
		for j, v := range l.Values {
			points = append(points, fmt.Sprintf("%.1f,%.1f", r.x(j), y(v)))
		}
		fmt.Fprintf(b, `<polyline points="%s" fill="none" stroke="%s" stroke-width="2"/>`+"\n", strings.Join(points, " "), color)
		for j, v := range l.Values {
			fmt.Fprintf(b, `<circle cx="%.1f" cy="%.1f" r="3" fill="%s"><title>%s: %s %s</title></circle>`+"\n",
				r.x(j), y(v), color, html.EscapeString(l.Name), Format(v), html.EscapeString(f.Unit))
		}
		left, under := float64(i%namesAcross*nameWidth), float64(plotHeight+36+i/namesAcross*16)
		fmt.Fprintf(b, `<rect x="%.0f" y="%.0f" width="10" height="10" rx="2" fill="%s"/>`+"\n", left, under-9, color)
		label(b, left+15, under, "start", "11", "#334155", l.Name)
	}
}

// x is where the i-th size stands.
func (r *Report) x(i int) float64 {
	first, last := math.Log(float64(r.Sizes[0])), math.Log(float64(r.Sizes[len(r.Sizes)-1]))
	if first == last {
		return plotWidth / 2
	}
	return plotWidth * (math.Log(float64(r.Sizes[i])) - first) / (last - first)
}

// scale returns a round number above all values of a figure, and the step of
// its grid.
func scale(f Figure) (top, step float64) {
	for _, l := range f.Lines {
		for _, v := range l.Values {
			top = max(top, v)
		}
	}
	if top <= 0 {
		return 1, 0.25
	}
	unit := math.Pow(10, math.Floor(math.Log10(top)))
	for _, m := range []float64{0.25, 0.5, 1, 2, 2.5} {
		if step = m * unit; step*5 >= top {
			break
		}
	}
	return math.Ceil(top/step) * step, step
}

// short writes a number of an axis: 1M, 100k, 0.25.
func short(v float64) string {
	switch {
	case v >= 1e6:
		return fmt.Sprintf("%gM", v/1e6)
	case v >= 1e4:
		return fmt.Sprintf("%gk", v/1e3)
	}
	return fmt.Sprintf("%.4g", v)
}

func label(b io.Writer, x, y float64, anchor, size, color, text string) {
	fmt.Fprintf(b, `<text x="%.1f" y="%.1f" text-anchor="%s" font-size="%s" fill="%s">%s</text>`+"\n", x, y, anchor, size, color, html.EscapeString(text))
}

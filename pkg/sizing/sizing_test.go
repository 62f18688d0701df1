package sizing_test

import (
	"encoding/xml"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/hallmark-id/hallmark/pkg/sizing"
)

func TestAPlanThatCannotBeMeantIsRefused(t *testing.T) {
	good := sizing.Plan{Sizes: []int{1, 10}, Samples: 1}
	if err := good.Check(); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(*sizing.Plan){
		"no size to measure at":              func(p *sizing.Plan) { p.Sizes = nil },
		"sizes must be between 1 and":        func(p *sizing.Plan) { p.Sizes = []int{0, 1} },
		"the smallest first":                 func(p *sizing.Plan) { p.Sizes = []int{10, 1} },
		"between 1 and 10000000":             func(p *sizing.Plan) { p.Sizes = []int{sizing.MaxSize + 1} },
		"a size is named twice":              func(p *sizing.Plan) { p.Sizes = []int{1, 1} },
		"samples must be between 1 and":      func(p *sizing.Plan) { p.Samples = 0 },
		"samples must be between 1 and 1000": func(p *sizing.Plan) { p.Samples = sizing.MaxSamples + 1 },
		"idle must be between 0 and 1h":      func(p *sizing.Plan) { p.Idle = -time.Second },
	} {
		p := good
		spoil(&p)
		if err := p.Check(); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("got %v, want %q", err, name)
		}
	}
}

func TestAQuantileIsATimeThatWasMeasured(t *testing.T) {
	var times []time.Duration
	for i := range 200 {
		times = append(times, time.Duration(200-i))
	}
	for q, want := range map[float64]time.Duration{0: 1, 0.5: 100, 0.99: 198, 1: 200} {
		if got := sizing.Quantile(times, q); got != want {
			t.Errorf("quantile %v is %d, want %d", q, got, want)
		}
	}
	if times[0] != 200 {
		t.Error("the times were put in another order")
	}
	if got := sizing.Quantile(nil, 0.5); got != 0 {
		t.Errorf("of nothing it is %v", got)
	}
}

func TestValuesAreWrittenWithThreeDigits(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 0.0123: "0.012", 0.5: "0.500", 1.5: "1.50", 12.34: "12.3", 123.4: "123", 12345: "12345"} {
		if got := sizing.Format(v); got != want {
			t.Errorf("%v is written %q, want %q", v, got, want)
		}
	}
}

func report(values ...float64) *sizing.Report {
	r := &sizing.Report{Subject: "entries", Machine: "2 CPUs <small>", Version: "1.0"}
	for i := range values {
		r.Sizes = append(r.Sizes, 100*(i+1))
	}
	for _, v := range values {
		r.Add("a & b", "ms", "p50", v)
		r.Add("a & b", "ms", "p99", 2*v)
	}
	r.AddTimes("times", []time.Duration{time.Millisecond, 3 * time.Millisecond})
	return r
}

func TestLinesGrowWithTheSizes(t *testing.T) {
	r := report(1, 2)
	if len(r.Figures) != 2 || len(r.Figures[0].Lines) != 2 || len(r.Figures[1].Lines) != 3 {
		t.Fatalf("got %+v", r.Figures)
	}
	if p99 := r.Figures[0].Lines[1]; p99.Name != "p99" || len(p99.Values) != 2 || p99.Values[1] != 4 {
		t.Errorf("got %+v", p99)
	}
	if largest := r.Figures[1].Lines[2]; largest.Name != "max" || largest.Values[0] != 3 {
		t.Errorf("got %+v", largest)
	}
}

func TestAReportIsCutToItsFirstSizes(t *testing.T) {
	r := report(1, 2)
	r.Cut(1)
	for _, f := range r.Figures {
		for _, l := range f.Lines {
			if len(r.Sizes) != 1 || len(l.Values) != 1 {
				t.Errorf("%d sizes, and %v of %s", len(r.Sizes), l.Values, l.Name)
			}
		}
	}
}

func TestThePictureShowsEveryValueWithinItsAxes(t *testing.T) {
	for name, values := range map[string][]float64{
		"several": {0.001, 0.002, 5}, "one size": {7}, "nothing but zero": {0, 0}, "large": {1e9, 2e9},
	} {
		t.Run(name, func(t *testing.T) {
			var b strings.Builder
			if err := report(values...).SVG(&b); err != nil {
				t.Fatal(err)
			}
			if strings.Contains(b.String(), "NaN") || strings.Contains(b.String(), "Inf") || strings.Contains(b.String(), `="-`) && strings.Contains(b.String(), `cy="-`) {
				t.Errorf("a point is nowhere:\n%s", b.String())
			}
			points := 0
			d := xml.NewDecoder(strings.NewReader(b.String()))
			for {
				token, err := d.Token()
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				if e, ok := token.(xml.StartElement); ok && e.Name.Local == "circle" {
					points++
				}
			}
			if want := 2*len(values) + 3; points != want {
				t.Errorf("%d points are drawn, want %d", points, want)
			}
		})
	}
}

package main

import (
	"encoding/json"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
)

func families(t *testing.T) []*dto.MetricFamily {
	t.Helper()
	all, err := serverMetrics()
	if err != nil {
		t.Fatal(err)
	}
	agents, err := agentMetrics()
	if err != nil {
		t.Fatal(err)
	}
	return append(all, agents...)
}

func TestNamesFollowTheConventionsOfPrometheus(t *testing.T) {
	problems, err := promlint.NewWithMetricFamilies(families(t)).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	for _, f := range families(t) {
		if n := f.GetName(); !strings.HasPrefix(n, "hallmark_server_") && !strings.HasPrefix(n, "hallmark_agent_") {
			t.Errorf("%s has another prefix", n)
		}
	}
}

var metricName = regexp.MustCompile(`hallmark_\w+`)

func TestTheDashboardAsksForMetricsThatExist(t *testing.T) {
	known := map[string]bool{}
	labels := map[string]bool{"le": true, "job": true, "instance": true}
	for _, f := range families(t) {
		if f.GetType() == dto.MetricType_HISTOGRAM {
			for _, suffix := range []string{"_bucket", "_sum", "_count"} {
				known[f.GetName()+suffix] = true
			}
		} else {
			known[f.GetName()] = true
		}
		for _, l := range f.Metric[0].Label {
			labels[l.GetName()] = true
		}
	}
	data, err := os.ReadFile("../../conf/grafana/hallmark.json")
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		UID, Title string
		Panels     []struct {
			ID      int
			Title   string
			Type    string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(data, &dashboard); err != nil {
		t.Fatal(err)
	}
	if dashboard.UID == "" || dashboard.Title == "" {
		t.Error("the dashboard has no uid or title")
	}
	queries, ids := 0, map[int]bool{}
	for _, p := range dashboard.Panels {
		if ids[p.ID] {
			t.Errorf("panel %q: its ID %d is another's", p.Title, p.ID)
		}
		ids[p.ID] = true
		if p.Type == "row" {
			continue
		}
		if len(p.Targets) == 0 {
			t.Errorf("panel %q asks for nothing", p.Title)
		}
		for _, q := range p.Targets {
			queries++
			names := metricName.FindAllString(q.Expr, -1)
			if len(names) == 0 {
				t.Errorf("panel %q: %q asks for none of our metrics", p.Title, q.Expr)
			}
			for _, n := range names {
				if !known[n] {
					t.Errorf("panel %q: there is no metric %s", p.Title, n)
				}
			}
			for _, by := range regexp.MustCompile(`\bby \(([^)]*)\)`).FindAllStringSubmatch(q.Expr, -1) {
				for l := range strings.SplitSeq(by[1], ",") {
					if !labels[strings.TrimSpace(l)] {
						t.Errorf("panel %q: there is no label %s", p.Title, l)
					}
				}
			}
		}
	}
	if queries < 15 {
		t.Errorf("the dashboard has %d queries only", queries)
	}
}

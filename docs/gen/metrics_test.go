package main

import (
	"encoding/json"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
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

// names returns the names of all series and labels that a query can ask for.
func names(t *testing.T) (known, labels map[string]bool) {
	t.Helper()
	known, labels = map[string]bool{}, map[string]bool{"le": true, "job": true, "instance": true}
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
	return known, labels
}

func TestTheAlertsAskForMetricsThatExist(t *testing.T) {
	data, err := os.ReadFile("../../conf/prometheus/hallmark.rules.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var rules struct {
		Groups []struct {
			Name  string
			Rules []struct {
				Alert, Expr, For    string
				Labels, Annotations map[string]string
			}
		}
	}
	if err := yaml.UnmarshalWithOptions(data, &rules, yaml.Strict()); err != nil {
		t.Fatal(err)
	}
	if len(rules.Groups) != 1 || len(rules.Groups[0].Rules) < 5 {
		t.Fatalf("the rules are %+v", rules)
	}
	known, _ := names(t)
	for _, r := range rules.Groups[0].Rules {
		if r.Labels["severity"] == "" || r.Annotations["summary"] == "" || r.Annotations["action"] == "" {
			t.Errorf("%s does not say how bad it is, what happened and what to do", r.Alert)
		}
		asked := metricName.FindAllString(r.Expr, -1)
		if len(asked) == 0 {
			t.Errorf("%s asks for none of our metrics", r.Alert)
		}
		for _, n := range asked {
			if !known[n] {
				t.Errorf("%s: there is no metric %s", r.Alert, n)
			}
		}
	}
}

func TestTheDashboardAsksForMetricsThatExist(t *testing.T) {
	known, labels := names(t)
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

package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/server"
)

var (
	inPages = regexp.MustCompile(`(?m)^\|.*`)
	quoted  = regexp.MustCompile("`([a-z0-9_]+):([^`]+)`")
	varying = regexp.MustCompile(`[A-Z].*`)
)

// The pages of the attestors and what the attestors say of themselves name the
// same selectors.
func TestAttestorsAndTheirPagesNameTheSameSelectors(t *testing.T) {
	for _, a := range server.NodeAttestors() {
		page, err := os.ReadFile(filepath.Join("../..", a.Page))
		if err != nil {
			t.Errorf("%s: %v", a.Name, err)
			continue
		}
		if a.Needed == "" {
			t.Errorf("%s does not say what one needs to pass for a node", a.Name)
		}
		used := map[string]bool{}
		for _, row := range inPages.FindAllString(string(page), -1) {
			for _, m := range quoted.FindAllStringSubmatch(strings.SplitN(row, " | ", 2)[0], -1) {
				if m[1] != a.Name {
					continue
				}
				found := false
				for _, f := range a.Selectors {
					if strings.HasPrefix(m[2], varying.ReplaceAllString(f.Value, "")) {
						used[f.Value], found = true, true
					}
				}
				if !found {
					t.Errorf("%s has a selector that the attestor does not name: %s", a.Page, m[0])
				}
			}
		}
		for _, f := range a.Selectors {
			if !used[f.Value] {
				t.Errorf("%s does not have the selector %s:%s", a.Page, a.Name, f.Value)
			}
		}
	}
}

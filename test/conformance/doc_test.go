package conformance

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// parts are the lines that docs/conformance.md has to have: of each prefix as
// many as this, from 1.
var parts = map[string]int{"ID": 31, "X": 40, "J": 33, "W": 45, "E": 29, "A": 40, "T": 26, "F": 51, "BE": 24, "BA": 45, "RF": 21, "TX": 12, "JA": 9, "SL": 12}

const root = "../.."

var (
	row      = regexp.MustCompile(`(?m)^\| ([A-Z]+-[0-9]{2}) \| ([^|]+) \| (tested|not applicable|decision|open): (.+) \|$`)
	namedOne = regexp.MustCompile("`(Test[A-Za-z0-9_]+)` \\(([a-z0-9/]+)\\)")
	function = regexp.MustCompile(`(?m)^func (Test[A-Za-z0-9_]+)\(`)
)

// allTests are the tests of the repository: folder and name.
func allTests(t testing.TB) map[string]bool {
	t.Helper()
	all := map[string]bool{}
	must(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		folder, err := filepath.Rel(root, filepath.Dir(path))
		for _, m := range function.FindAllStringSubmatch(string(text), -1) {
			all[folder+" "+m[1]] = true
		}
		return err
	}))
	return all
}

// carries reports whether a test's name has a line's number, or a range
// A15_To_A21 that it is in.
func carries(test, line string) bool {
	prefix, number, _ := strings.Cut(line, "-")
	words := strings.Split(test, "_")
	for i, word := range words {
		if word == prefix+number {
			return true
		}
		if word == "To" && i > 0 && i+1 < len(words) && strings.HasPrefix(words[i-1], prefix) &&
			words[i-1] <= prefix+number && prefix+number <= words[i+1] {
			return true
		}
	}
	return false
}

func TestTheDocumentHasEachLineAndNamesTestsThatExist(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(root, "docs", "conformance.md"))
	must(t, err)
	tests, lines := allTests(t), map[string]bool{}
	for _, m := range row.FindAllStringSubmatch(string(text), -1) {
		line, status, what := m[1], m[3], m[4]
		if lines[line] {
			t.Errorf("%s is there twice", line)
		}
		lines[line] = true
		if status != "tested" {
			continue
		}
		named := namedOne.FindAllStringSubmatch(what, -1)
		if len(named) == 0 {
			t.Errorf("%s is tested, but no test is named", line)
		}
		for _, n := range named {
			if !tests[n[2]+" "+n[1]] {
				t.Errorf("%s: there is no %s in %s", line, n[1], n[2])
			}
			if !carries(n[1], line) {
				t.Errorf("%s: %s does not carry its number", line, n[1])
			}
		}
	}
	for prefix, n := range parts {
		for i := 1; i <= n; i++ {
			if line := fmt.Sprintf("%s-%02d", prefix, i); !lines[line] {
				t.Errorf("%s is missing", line)
			}
		}
	}
}

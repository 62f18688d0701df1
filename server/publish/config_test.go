package publish_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/server/publish"
)

// mistakes returns what is wrong with targets.
func mistakes(targets ...publish.Config) string {
	var all []string
	publish.CheckAll(targets, func(path string, err error) { all = append(all, path+": "+err.Error()) })
	return strings.Join(all, "\n")
}

func TestTargetsAreBounded(t *testing.T) {
	var many []publish.Config
	for n := range publish.MaxTargets + 1 {
		many = append(many, publish.Config{Name: fmt.Sprint("t", n), Bundle: "b", Directory: &publish.DirectoryConfig{Path: fmt.Sprint("/srv/", n)}})
	}
	if got := mistakes(many...); got != ": publish has 21 targets; the most is 20" {
		t.Errorf("of too many targets it says %q", got)
	}
	if got := mistakes(many[1:]...); got != "" {
		t.Errorf("of as many as there may be it says %q", got)
	}
	one := many[0]
	for n := range 21 {
		one.Issuers = append(one.Issuers, publish.IssuerConfig{URL: issuer, Prefix: fmt.Sprint("p", n)})
	}
	if got := mistakes(one); got != "0.issuers: the target has 21 issuers; the most is 20" {
		t.Errorf("of too many issuers it says %q", got)
	}
	one.Issuers, one.Bundle = nil, strings.Repeat("a/", 250)+"a"
	if got := mistakes(one); !strings.Contains(got, "501 bytes long, and the most is 500") {
		t.Errorf("of a long path it says %q", got)
	}
	one.Bundle = one.Bundle[2:]
	if got := mistakes(one); got != "" {
		t.Errorf("of one that is not too long it says %q", got)
	}
}

// FuzzPathsStayInTheTarget shows that what is taken leads nowhere else.
func FuzzPathsStayInTheTarget(f *testing.F) {
	for _, path := range []string{"bundle.json", "../x", "a/./b", "/x", "a//b", "a\x00b", "%2e%2e/x", "a/..", ".well-known/x", "a\\b", "..."} {
		f.Add(path)
	}
	f.Fuzz(func(t *testing.T, path string) {
		if path == "" || mistakes(publish.Config{Name: "x", Bundle: path, Directory: &publish.DirectoryConfig{Path: "/srv"}}) != "" {
			return
		}
		for segment := range strings.SplitSeq(path, "/") {
			if segment == "" || segment == "." || segment == ".." || strings.ContainsAny(segment, "\\%?#\x00 \n") {
				t.Errorf("%q is taken", path)
			}
		}
	})
}

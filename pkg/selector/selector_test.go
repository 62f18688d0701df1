package selector_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/pkg/selector"
)

func set(t testing.TB, words ...string) selector.Set {
	t.Helper()
	var all []selector.Selector
	for _, w := range words {
		s, err := selector.Parse(w)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, s)
	}
	return selector.NewSet(all...)
}

func TestParseSplitsAtTheFirstColon(t *testing.T) {
	s, err := selector.Parse("k8s:pod-label:app:web")
	if err != nil {
		t.Fatal(err)
	}
	if s.Type != "k8s" || s.Value != "pod-label:app:web" {
		t.Errorf("got type %q, value %q", s.Type, s.Value)
	}
}

func TestParseSaysWhatIsWrong(t *testing.T) {
	for in, want := range map[string]string{
		"":          "has no colon",
		"unix":      "has no colon",
		":uid":      "has no type",
		"unix:":     "has no value",
		"x:" + long: "the most is 4096",
		long + ":x": "the most is 255",
	} {
		_, err := selector.Parse(in)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Parse(%.20q): got error %v, want one with %q", in, err, want)
		}
	}
	if _, err := selector.New("a:b", "c"); err == nil {
		t.Error("a type with a colon was accepted")
	}
}

var long = strings.Repeat("x", selector.MaxValue+1)

func TestSetsAreSortedWithoutDuplicates(t *testing.T) {
	got := set(t, "unix:uid:2", "unix:uid:1", "docker:label:a:b", "unix:uid:1").Strings()
	want := []string{"docker:label:a:b", "unix:uid:1", "unix:uid:2"}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestMissingIsWhatKeepsASetFromBeingASubset(t *testing.T) {
	attested := set(t, "unix:uid:1", "unix:gid:1", "unix:path:/bin/a")
	for _, c := range []struct {
		set     selector.Set
		missing []string
	}{
		{nil, nil},
		{set(t, "unix:uid:1"), nil},
		{set(t, "unix:gid:1", "unix:path:/bin/a", "unix:uid:1"), nil},
		{set(t, "unix:uid:1", "unix:uid:2"), []string{"unix:uid:2"}},
		{set(t, "a:b", "unix:gid:1", "z:z"), []string{"a:b", "z:z"}},
	} {
		var missing []string
		for s := range c.set.Missing(attested) {
			missing = append(missing, s.String())
		}
		if !slices.Equal(missing, c.missing) {
			t.Errorf("%v: missing %v, want %v", c.set, missing, c.missing)
		}
		if got := c.set.SubsetOf(attested); got != (len(c.missing) == 0) {
			t.Errorf("%v: SubsetOf is %v", c.set, got)
		}
	}
	if !attested.Contains(selector.Selector{Type: "unix", Value: "gid:1"}) || attested.Contains(selector.Selector{Type: "unix", Value: "gid:2"}) {
		t.Error("Contains is wrong")
	}
}

func FuzzParse(f *testing.F) {
	f.Add("unix:uid:1000")
	f.Add(":")
	f.Fuzz(func(t *testing.T, in string) {
		s, err := selector.Parse(in)
		if err != nil {
			return
		}
		if s.String() != in {
			t.Fatalf("%q became %q", in, s)
		}
		if s.Type == "" || s.Value == "" || strings.Contains(s.Type, ":") {
			t.Fatalf("%q was accepted as %#v", in, s)
		}
	})
}

package main

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/hallmark-id/hallmark/pkg/config"
)

// sample is a configuration with something of everything.
type sample struct {
	// Name is the name, for
	// example x. Default web.
	Name string `yaml:"name"`
	// Word is one of two.
	//
	// It can come from elsewhere. Default: that of [sample.Name].
	Word string          `yaml:"word" oneof:"a,b" env:"expand"`
	Wait config.Duration `yaml:"wait"` // how long. Default 1m30s.
	// Pick says what there is.
	Pick pick `yaml:"pick"`
	// May says what there may be.
	May *pick `yaml:"may"`
	// List has several. Default: none.
	List []string `yaml:"list"`
}

// pick is a choice: one of its fields is set.
type pick struct {
	A *struct1 `yaml:"a"` // the first
	B *struct1 `yaml:"b"` // the second
}

// struct1 has nothing in it.
type struct1 struct{}

// undocumented lacks a comment.
type undocumented struct {
	Key string `yaml:"key"`
}

// wrong names another default than there is.
type wrong struct {
	// Key is a key. Default b.
	Key string `yaml:"key"`
}

// The generator does not look into tests, so the comments above are given to it
// as another file's would be.
func sampleTree(t *testing.T, v any) (*key, error) {
	t.Helper()
	docs := comments{root: "../.."}
	pkg := reflect.TypeOf(v).PkgPath()
	docs.parsed = map[string]map[string]string{pkg: {}}
	if err := collectFile(docs.parsed[pkg], "config_test.go"); err != nil {
		t.Fatal(err)
	}
	return docs.tree(reflect.ValueOf(v))
}

func TestSchemaAndPageSayWhatTheCommentsSay(t *testing.T) {
	root, err := sampleTree(t, sample{Name: "web", Wait: config.Duration(90 * time.Second)})
	if err != nil {
		t.Fatal(err)
	}
	text, err := schema("sample", root)
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]any
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	properties := got["properties"].(map[string]any)
	for path, want := range map[string]any{
		"name.description": "name is the name, for example x.",
		"name.default":     "web",
		"word.description": "word is one of two.\n\nIt can come from elsewhere.",
		"word.anyOf":       []any{map[string]any{"type": "string", "enum": []any{"a", "b"}}, map[string]any{"pattern": "[$][{]"}},
		"wait.default":     "1m30s",
		"wait.pattern":     config.Duration(0).Pattern(),
		"pick.type":        []any{"object", "null"},
		"may.type":         "object",
		"list.type":        "array",
	} {
		name, at, _ := strings.Cut(path, ".")
		if got := properties[name].(map[string]any)[at]; !reflect.DeepEqual(got, want) {
			t.Errorf("%s is %v, want %v", path, got, want)
		}
	}
	if n := len(properties["pick"].(map[string]any)["oneOf"].([]any)); n != 3 {
		t.Errorf("pick has %d forms; it is a, b, or neither", n)
	}
	if n := len(properties["may"].(map[string]any)["oneOf"].([]any)); n != 2 {
		t.Errorf("may has %d forms; it is a or b", n)
	}
	page := string(configPage("sample", root))
	for _, want := range []string{
		"| `name` | text | `web` | name is the name, for example x. |\n",
		"| `word` | `a`, `b`, env | that of sample.Name | word is one of two.<br>It can come from elsewhere. |\n",
		"| `wait` | duration | `1m30s` | how long. |\n",
		"| `pick` | [section](#pick) |  | pick says what there is. |\n",
		"\n## pick\n\npick is a choice: one of its keys is set.\n",
		"\n## may.a\n\nmay.a has nothing in it.\n",
	} {
		if !strings.Contains(page, want) {
			t.Errorf("the page lacks %q:\n%s", want, page)
		}
	}
}

func TestAKeyWithoutACommentIsRefused(t *testing.T) {
	if _, err := sampleTree(t, undocumented{}); err == nil || !strings.Contains(err.Error(), "undocumented.Key has no comment") {
		t.Errorf("error is %v", err)
	}
}

func TestACommentWithAnotherDefaultThanTheCodeIsRefused(t *testing.T) {
	if _, err := sampleTree(t, wrong{Key: "a"}); err == nil || !strings.Contains(err.Error(), `must end with "Default a."`) {
		t.Errorf("error is %v", err)
	}
}

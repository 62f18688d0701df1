package config_test

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/config"
)

type options struct {
	TrustDomain spiffeid.TrustDomain `yaml:"trust_domain"`
	Listen      string               `yaml:"listen"`
	DataDir     string               `yaml:"data_dir" env:"expand"`
	Insecure    bool                 `yaml:"insecure"`
	Held        int                  `yaml:"held"`
	Port        uint16               `yaml:"port"`
	Ratio       float64              `yaml:"ratio"`
	AdminIDs    []spiffeid.ID        `yaml:"admin_ids"`
	Paths       []string             `yaml:"paths" env:"expand"`
	Keys        keys                 `yaml:"keys"`
	X509        struct {
		KeyType  string          `yaml:"key_type" oneof:"ec-p256,ec-p384,rsa-2048"`
		Lifetime config.Duration `yaml:"svid_lifetime"`
	} `yaml:"x509"`
	Labels map[string]string `yaml:"labels"`
	Log    config.Log        `yaml:"log"`
	shared `yaml:",inline"`
	Plain  string // no configuration
}

type keys struct {
	Disk *struct {
		Dir string `yaml:"dir"`
	} `yaml:"disk"`
	Memory *struct{} `yaml:"memory"`
}

type shared struct {
	Socket string `yaml:"socket"`
}

func decode(t testing.TB, text string, set ...config.Setting) (options, error) {
	t.Helper()
	var o options
	err := config.Decode(config.Source{Name: "server.yaml", Data: []byte(text), Set: set}, &o)
	return o, err
}

func TestDecodeReadsEveryKindOfValue(t *testing.T) {
	o, err := decode(t, `
# a comment
trust_domain: example.org
listen: "127.0.0.1:8081" # another
insecure: true
held: -5
port: 0x1F
ratio: 3
admin_ids: [spiffe://example.org/a, "spiffe://example.org/b"]
paths:
  - /a
  - /b
keys:
  disk: {dir: /keys}
  memory: {}
x509:
  key_type: ec-p384
  svid_lifetime: 1h30m
labels:
  a.b: c
log:
  # level: debug
socket: |
  /run/x
`)
	if err != nil {
		t.Fatal(err)
	}
	if o.TrustDomain.Name() != "example.org" || o.Listen != "127.0.0.1:8081" || !o.Insecure || o.Held != -5 || o.Port != 31 || o.Ratio != 3 {
		t.Errorf("scalars: %+v", o)
	}
	if len(o.AdminIDs) != 2 || o.AdminIDs[1].Path() != "/b" || !reflect.DeepEqual(o.Paths, []string{"/a", "/b"}) {
		t.Errorf("lists: %v %v", o.AdminIDs, o.Paths)
	}
	if o.Keys.Disk == nil || o.Keys.Disk.Dir != "/keys" || o.Keys.Memory == nil {
		t.Errorf("pointers: %+v", o.Keys)
	}
	if o.X509.KeyType != "ec-p384" || time.Duration(o.X509.Lifetime) != 90*time.Minute {
		t.Errorf("nested: %+v", o.X509)
	}
	if o.Labels["a.b"] != "c" || o.Socket != "/run/x\n" {
		t.Errorf("map %v, inline %q", o.Labels, o.Socket)
	}
}

func TestDecodeLeavesWhatIsNotNamed(t *testing.T) {
	o := options{Listen: "default", Held: 3}
	for _, text := range []string{"", "# nothing\n", "---\n", "held: 4\n"} {
		if err := config.Decode(config.Source{Data: []byte(text)}, &o); err != nil {
			t.Fatalf("%q: %v", text, err)
		}
	}
	if o.Listen != "default" || o.Held != 4 || o.Keys.Disk != nil {
		t.Errorf("got %+v", o)
	}
}

func TestDecodeSaysWhereAndWhat(t *testing.T) {
	for name, c := range map[string]struct{ text, want string }{
		"unknown key, another spelling": {"trustdomain: example.org\n",
			"server.yaml:1:1: unknown key `trustdomain`, did you mean `trust_domain`?\n  1 | trustdomain: example.org\n    | ^"},
		"unknown key, mistyped": {"x509:\n  svid_lifetmie: 1h\n",
			"server.yaml:2:3: unknown key `svid_lifetmie`, did you mean `svid_lifetime`?\n  2 |   svid_lifetmie: 1h\n    |   ^"},
		"unknown key, nothing near": {"x509: {colour: red}\n",
			"server.yaml:1:8: unknown key `colour`; the keys here are key_type, svid_lifetime\n  1 | x509: {colour: red}\n    |        ^"},
		"unknown key where there are none": {"keys: {memory: {a: 1}}\n", "unknown key `a`; there are no keys here"},
		"a key of a field without a tag":   {"Plain: x\n", "unknown key `Plain`"},
		"duplicate key":                    {"held: 1\nheld: 2\n", "server.yaml:2:1: key `held` is given twice, first on line 1"},
		"number for text":                  {"listen: 8081\n", "server.yaml:1:9: `listen` must be text, not a number; quote it: \"8081\""},
		"boolean for text":                 {"listen: true\n", "`listen` must be text, not true or false; quote it: \"true\""},
		"list for text":                    {"listen: [a]\n", "`listen` must be text, not a list"},
		"text for boolean":                 {"insecure: yes\n", "server.yaml:1:11: `insecure` must be true or false, not \"yes\""},
		"text for number":                  {"held: many\n", "`held` must be a whole number, not \"many\""},
		"fraction for whole number":        {"held: 1.5\n", "`held` must be a whole number, not \"1.5\""},
		"number too large":                 {"port: 65536\n", "`port` must lie between 0 and 65535"},
		"negative port":                    {"port: -1\n", "`port` must lie between 0 and 65535"},
		"number beyond 64 bits":            {"held: 99999999999999999999\n", "`held` must"},
		"text for list":                    {"paths: /a\n", "`paths` must be a list, not \"/a\""},
		"item of a list":                   {"paths: [a, {b: c}]\n", "server.yaml:1:12: item 2 of `paths` must be text, not a mapping"},
		"text for section":                 {"x509: yes\n", "`x509` must be a mapping of keys to values, not \"yes\""},
		"list for the whole":               {"- a\n", "server.yaml:1:1: configuration must be a mapping of keys to values, not a list"},
		"no value":                         {"listen:\nheld: 1\n", "`listen` has no value; give one, or remove it"},
		"no value for an optional section": {"keys:\n  memory:\n", "`memory` has no value; write {} after the colon to take its defaults, or remove it"},
		"impossible choice":                {"x509: {key_type: ecp256}\n", "`key_type` cannot be \"ecp256\"; did you mean \"ec-p256\"?"},
		"impossible choice, nothing near":  {"x509: {key_type: ed25519}\n", "`key_type` cannot be \"ed25519\"; it is one of ec-p256, ec-p384, rsa-2048"},
		"log level":                        {"log: {level: warning}\n", "`level` cannot be \"warning\"; did you mean \"warn\"?"},
		"duration without a unit":          {"x509: {svid_lifetime: 30}\n", "server.yaml:1:23: `svid_lifetime`: duration \"30\" has no unit; write 30s, 30m, 30h or 30d"},
		"trust domain":                     {"trust_domain: Example Org\n", "server.yaml:1:15: `trust_domain`: "},
		"a list where one value belongs":   {"trust_domain: [a]\n", "`trust_domain` must be a single value, not a list"},
		"item that reads text":             {"admin_ids: [http://x]\n", "server.yaml:1:13: item 1 of `admin_ids`: "},
		"a key that is a number":           {"1: x\n", "server.yaml:1:1: a key must be text, not a number"},
		"unclosed bracket":                 {"paths: [a\nheld: 1\n", "server.yaml:2:1: ',' or ']' must be specified"},
		"tab":                              {"x509:\n\tkey_type: x\n", "server.yaml:2:1: found character"},
		"second document":                  {"held: 1\n---\nheld: 2\n", "server.yaml:3:1: a second document begins; a configuration is one"},
		"anchor":                           {"listen: &a x\n", "server.yaml:1:9: anchors (&name) are not supported"},
		"alias":                            {"listen: *a\n", "server.yaml:1:9: aliases (*name) are not supported"},
		"merge key":                        {"x509:\n  <<: {key_type: x}\n", "merge keys (<<) are not supported"},
		"tag":                              {"listen: !!str 1\n", "tags (!name) are not supported"},
		"not UTF-8":                        {"listen: \xff\n", "server.yaml: configuration is not UTF-8 text"},
		"too large":                        {strings.Repeat("#", config.MaxSize+1), "server.yaml: configuration is larger than 1048576 bytes"},
		"too deep":                         {strings.Repeat("[", 100), "server.yaml:1:65: more than 64 lists or mappings within each other"},
		"too deep in dashes":               {strings.Repeat("- ", 100), "more than 64 lists or mappings within each other"},
		"too many words":                   {strings.Repeat("- a\n", 60_000), "server.yaml: configuration has more than 100000 words"},
		"unset variable":                   {"data_dir: ${HALLMARK_NO_SUCH}/x\n", "server.yaml:1:11: `data_dir`: environment variable HALLMARK_NO_SUCH is not set"},
		"malformed variable":               {"data_dir: ${a b}\n", `"${a b}" is no variable; write ${NAME}`},
		"unclosed variable":                {"data_dir: ${HOME\n", `"${HOME" is no variable`},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := decode(t, c.text)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got  %v\nwant %s", err, c.want)
			}
		})
	}
}

func TestDecodeReportsSeveralMistakesAtOnce(t *testing.T) {
	_, err := decode(t, "a_a: 1\nheld: x\nport: y\n")
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok || len(joined.Unwrap()) != 3 {
		t.Fatalf("got %v", err)
	}
	var first *config.Error
	if !errors.As(err, &first) || first.Line != 1 || first.Column != 1 || first.Name != "server.yaml" {
		t.Errorf("first: %+v", first)
	}
	if _, err := decode(t, strings.Repeat("x", 20)+": 1\n"+manyKeys(50)); len(err.(interface{ Unwrap() []error }).Unwrap()) != 10 {
		t.Errorf("expected ten mistakes, got %v", err)
	}
}

func manyKeys(n int) string {
	var b strings.Builder
	for i := range n {
		b.WriteString("zzzzzzzzzz" + strings.Repeat("q", i) + ": 1\n")
	}
	return b.String()
}

func TestDecodeExpandsVariablesOnlyWhereAsked(t *testing.T) {
	t.Setenv("HALLMARK_TEST", "/var/x")
	o, err := decode(t, "data_dir: ${HALLMARK_TEST}/y$z\npaths: [\"${HALLMARK_TEST}\", \"$${HALLMARK_TEST}\"]\nlisten: ${HALLMARK_TEST}\n")
	if err != nil {
		t.Fatal(err)
	}
	if o.DataDir != "/var/x/y$z" || o.Paths[0] != "/var/x" || o.Paths[1] != "${HALLMARK_TEST}" || o.Listen != "${HALLMARK_TEST}" {
		t.Errorf("got %q %q %q", o.DataDir, o.Paths, o.Listen)
	}
}

func TestSettingsOverrideTheFile(t *testing.T) {
	o, err := decode(t, "listen: a\nheld: 1\n",
		config.Setting{Path: "listen", Value: "b", From: "--listen"},
		config.Setting{Path: "listen", Value: "c", From: "--listen"},
		config.Setting{Path: "held", Value: "7"},
		config.Setting{Path: "port", Value: "80"},
		config.Setting{Path: "ratio", Value: "0.5"},
		config.Setting{Path: "insecure", Value: "true"},
		config.Setting{Path: "paths", Value: "${x},y"},
		config.Setting{Path: "keys.disk.dir", Value: "/k"},
		config.Setting{Path: "x509.svid_lifetime", Value: "90m"},
		config.Setting{Path: "socket", Value: "/s"},
		config.Setting{Path: "trust_domain", Value: "example.com"})
	if err != nil {
		t.Fatal(err)
	}
	if o.Listen != "c" || o.Held != 7 || o.Port != 80 || o.Ratio != 0.5 || !o.Insecure || o.Paths[0] != "${x}" || o.Paths[1] != "y" ||
		o.Keys.Disk.Dir != "/k" || time.Duration(o.X509.Lifetime) != 90*time.Minute || o.Socket != "/s" || o.TrustDomain.Name() != "example.com" {
		t.Errorf("got %+v", o)
	}
}

func TestSettingsErrorsNameTheFlag(t *testing.T) {
	for _, c := range []struct{ path, value, want string }{
		{"held", "x", `--flag: value must be a whole number, not "x"`},
		{"port", "99999", "--flag: value must lie between 0 and 65535"},
		{"insecure", "maybe", "--flag: value must be true or false"},
		{"x509.svid_lifetime", "5", `--flag: value: duration "5" has no unit`},
		{"log.level", "loud", `--flag: value cannot be "loud"; it is one of debug, info, warn, error`},
		{"x509", "a", "--flag: this can only be set in a file"},
		{"listen.x", "a", "--flag: there is no key `listen.x`"},
		{"lisen", "a", "--flag: unknown key `lisen`, did you mean `listen`?"},
	} {
		_, err := decode(t, "", config.Setting{Path: c.path, Value: c.value, From: "--flag"})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s=%s: got %v, want %s", c.path, c.value, err, c.want)
		}
	}
}

func TestErrorfPointsToTheValue(t *testing.T) {
	src := config.Source{Name: "a.yaml", Data: []byte("x509:\n  svid_lifetime: 2s\nadmin_ids:\n  - a\n  - b\n"),
		Set: []config.Setting{{Path: "listen", Value: "x", From: "--listen"}}}
	for _, c := range []struct{ path, want string }{
		{"x509.svid_lifetime", "a.yaml:2:18: too short\n  2 |   svid_lifetime: 2s\n    |                  ^"},
		{"admin_ids.1", "a.yaml:5:5: too short"},
		{"x509", "a.yaml:2:3: too short"},
		{"listen", "--listen: too short"},
		{"missing.key", "a.yaml: too short"},
		{"admin_ids.7", "a.yaml: too short"},
	} {
		if got := src.Errorf(c.path, "too %s", "short").Error(); !strings.HasPrefix(got, c.want) {
			t.Errorf("%s: got %q, want %q", c.path, got, c.want)
		}
	}
	if got := (config.Source{}).Errorf("a", "missing").Error(); got != "missing" {
		t.Errorf("without a name: %q", got)
	}
	if got := (config.Source{Data: []byte("[")}).Errorf("a", "missing").Error(); got != "missing" {
		t.Errorf("malformed file: %q", got)
	}
}

func TestLookupReturnsWhatIsGiven(t *testing.T) {
	src := config.Source{Data: []byte("listen: a\nport: 0x10\nx509: {key_type: b}\npaths: [c]\n"),
		Set: []config.Setting{{Path: "listen", Value: "d"}}}
	for path, want := range map[string]string{"listen": "d", "port": "0x10", "x509.key_type": "b", "paths.0": "c"} {
		if got, ok := src.Lookup(path); !ok || got != want {
			t.Errorf("%s: got %q, %v; want %q", path, got, ok, want)
		}
	}
	for _, path := range []string{"paths", "x509", "held", "x509.svid_lifetime"} {
		if got, ok := src.Lookup(path); ok {
			t.Errorf("%s: got %q, want nothing", path, got)
		}
	}
	if _, ok := (config.Source{Data: []byte("[")}).Lookup("a"); ok {
		t.Error("malformed file")
	}
}

func TestSnippetsAreShortAndAligned(t *testing.T) {
	_, err := decode(t, "x509: {\tkey_type: "+strings.Repeat("y", 500)+"}\n")
	var e *config.Error
	if !errors.As(err, &e) {
		t.Fatal(err)
	}
	lines := strings.Split(e.Snippet, "\n")
	if len(lines) != 2 || len(lines[0]) > 180 || !strings.HasSuffix(lines[0], "…") || !strings.Contains(lines[1], "\t") {
		t.Errorf("got %q", e.Snippet)
	}
}

func TestReadFileIsBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.yaml")
	if _, err := config.ReadFile(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
	if err := os.WriteFile(path, []byte("a: b\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if src, err := config.ReadFile(path); err != nil || src.Name != path || string(src.Data) != "a: b\n" {
		t.Errorf("got %+v, %v", src, err)
	}
	if err := os.WriteFile(path, make([]byte, config.MaxSize+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := config.ReadFile(path); err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("large file: %v", err)
	}
}

func TestDurationReadsAndWritesOneForm(t *testing.T) {
	for _, c := range []struct {
		text string
		want time.Duration
		back string
	}{
		{"0", 0, "0s"}, {"0s", 0, "0s"}, {"0d", 0, "0s"}, {"1h30m", 90 * time.Minute, "1h30m"}, {"90m", 90 * time.Minute, "1h30m"},
		{"24h", 24 * time.Hour, "24h"}, {"1d", 24 * time.Hour, "24h"}, {"30d", 720 * time.Hour, "30d"}, {"2d12h", 60 * time.Hour, "2d12h"},
		{"500ms", 500 * time.Millisecond, "500ms"}, {"1h0m5s", time.Hour + 5*time.Second, "1h0m5s"}, {"10m", 10 * time.Minute, "10m"},
	} {
		d, err := config.ParseDuration(c.text)
		if err != nil || time.Duration(d) != c.want || d.String() != c.back {
			t.Errorf("%s: got %v (%v), %v", c.text, time.Duration(d), d, err)
		}
	}
	for _, text := range []string{"", "1", "1.5", "-1h", "-0", "1x", "h", "1d-1h", "1d1d", "d", "1.5d", "99999999999d", "106751d24h", "4294967295d", "nan"} {
		if d, err := config.ParseDuration(text); err == nil {
			t.Errorf("%q: got %v, want an error", text, d)
		}
	}
}

// FuzzDurationPattern compares the pattern that editors check by to what is
// read.
func FuzzDurationPattern(f *testing.F) {
	for _, seed := range []string{"0", "0s", "1h30m", "30d", "2d12h", "1d0", "1d+1h", "+1.5s", ".5m", "1.s", "90", "-1h", "1d1d", "+0", "00", "1h "} {
		f.Add(seed)
	}
	pattern := regexp.MustCompile(config.Duration(0).Pattern())
	long := regexp.MustCompile(`[0-9]{5}`) // it may be more than a Duration can hold
	f.Fuzz(func(t *testing.T, text string) {
		_, err := config.ParseDuration(text)
		if matches := pattern.MatchString(text); matches != (err == nil) && (!matches || len(text) < 30 && !long.MatchString(text)) {
			t.Errorf("%q: matches %v, but is read with the error %v", text, matches, err)
		}
	})
}

func TestKeysAreThoseAtTheTop(t *testing.T) {
	for text, want := range map[string][]string{"b: {c: 1}\na: 2\n": {"b", "a"}, "": nil, "- a\n": nil, "a: [\n": nil} {
		if got := (config.Source{Data: []byte(text)}).Keys(); !reflect.DeepEqual(got, want) {
			t.Errorf("%q: got %v, want %v", text, got, want)
		}
	}
}

func TestLogMakesTheLoggerItDescribes(t *testing.T) {
	var b strings.Builder
	log, err := config.Log{Level: "warn", Format: "json"}.Logger(&b)
	if err != nil {
		t.Fatal(err)
	}
	log.Info("hidden")
	log.Warn("shown")
	if got := b.String(); !strings.HasPrefix(got, "{") || !strings.Contains(got, `"shown"`) || strings.Contains(got, "hidden") {
		t.Errorf("got %q", got)
	}
	for _, l := range []config.Log{{Level: "loud"}, {Format: "xml"}} {
		if _, err := l.Logger(&b); err == nil {
			t.Errorf("%+v: want an error", l)
		}
	}
	if log, err = (config.Log{}).Logger(&b); err != nil || log.Enabled(t.Context(), -4) {
		t.Errorf("default: %v", err)
	}
}

func FuzzDecode(f *testing.F) {
	for _, seed := range []string{
		"", "a", "held: 1\nx509:\n  key_type: ec-p256\n", "paths:\n  - a\n  - [b]\nlabels: {a: b}\n", "keys: {disk: {dir: x}}\n",
		"listen: |\n  a\n  b\n", "listen: >-\n  a\n", "a: &b c\n", "? a\n: b\n", "---\na: 1\n...\n---\n", "\"a\\u0000\": 'b'\n", "data_dir: ${PATH}\n",
		"log: {level: info, format: json}\nx509: {svid_lifetime: 1d2h}\n", ": x", "- - -", "\ufeffheld: 1", "held: 0o17", "ratio: .inf", "held:\n\t1",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 4096 {
			return
		}
		var o options
		src := config.Source{Name: "f", Data: data}
		err := config.Decode(src, &o)
		if err != nil && err.Error() == "" {
			t.Error("an error without a text")
		}
		_ = src.Errorf("x509.key_type", "checked").Error()
	})
}

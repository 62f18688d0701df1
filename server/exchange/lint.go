package exchange

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/pkg/entry"
)

// Finding is something in the configuration of an issuer, or in an entry for its
// tokens, that lets in more than is meant, or may one day.
type Finding struct {
	Issuer string // its name
	Entry  *entry.Entry
	Says   string // what is the matter
	Remedy string
}

// renamed are names that somebody can give up and another take, by preset, and
// what stays in their place.
var renamed = map[string]map[string]string{
	"github": {"repository": "repository_id", "repository_owner": "repository_owner_id"},
	"gitlab": {"project_path": "project_id", "namespace_path": "namespace_id"},
	"gcp":    {"email": "account_id", "instance_name": "instance_id", "project_id": "project_number"},
}

// public are issuers that give tokens to everybody, by preset.
var public = map[string]string{
	"github": "claims.repository_owner_id", "gitlab": "claims.namespace_id", "gcp": "claims.sub",
}

// narrow are the selectors, by preset, that say which code may have a token, not
// only of which project it is.
var narrow = map[string][]string{
	"github": {"ref", "environment", "job_workflow_ref", "job_workflow_sha", "workflow_ref", "workflow_sha", "sha"},
	"gitlab": {"ref", "ref_path", "ref_protected", "environment", "environment_protected", "ci_config_ref_uri", "ci_config_sha", "sha"},
}

// longAge is an age of tokens that is more than any issuer needs by itself.
const longAge = 24 * time.Hour

// Lint looks at the configured issuers and the entries for their tokens. It finds
// what is likely a mistake; that it finds nothing is no proof.
func (x *Exchange) Lint() []Finding {
	var out []Finding
	byName := make(map[string]*trusted)
	for _, of := range x.issuers {
		byName[of.Name()] = of
	}
	view := x.o.Registry.View()
	for _, c := range x.o.Issuers {
		of := byName[c.Name]
		add := func(e *entry.Entry, remedy, format string, args ...any) {
			out = append(out, Finding{c.Name, e, fmt.Sprintf(format, args...), remedy})
		}
		x.lintConfig(of, func(remedy, format string, args ...any) { add(nil, remedy, format, args...) })
		for e := range view.EntriesByParent(of.parent) {
			lintEntry(of, e, func(remedy, format string, args ...any) { add(e, remedy, format, args...) })
		}
	}
	prefix := spiffeid.RequireFromPath(x.o.TrustDomain, parentPath[:len(parentPath)-1]).String() + "/"
	for e := range view.Entries("") {
		if name, ok := strings.CutPrefix(e.ParentID.String(), prefix); ok && byName[name] == nil {
			out = append(out, Finding{name, e, "no issuer has this name: no token gets the entry", "correct the parent ID, or delete the entry"})
		}
	}
	return out
}

type report = func(remedy, format string, args ...any)

func (x *Exchange) lintConfig(of *trusted, add report) {
	c := of.config
	for _, a := range c.Audiences {
		if a != x.o.Issuer {
			add("have tokens issued for "+x.o.Issuer+", and remove audiences",
				"audience %s is not this endpoint alone: whoever else is shown such tokens can show them here", quoted(a))
		}
	}
	if what, ok := public[c.Preset]; ok && c.Condition == "" && c.Issuer == presets[c.Preset].issuer {
		add("set a condition such as "+what+` == "…"`, "%s gives tokens to everybody, and no condition says whose are taken", c.Issuer)
	}
	if age := time.Duration(c.MaxAge); age > longAge {
		add("leave max_age out", "tokens are taken for %s after they were issued: so long is a stolen one of use", c.MaxAge)
	}
	if c.AllowLoopback {
		add("remove allow_loopback", "allow_loopback fetches keys over http, for trials")
	}
	if c.Reusable && c.Preset != "kubernetes" {
		add("remove reusable, unless the issuer renews tokens seldom", "a token is taken as often as it is shown: a stolen one too")
	}
	if c.OutliveToken {
		add("remove outlive_token, unless entries have short lifetimes", "SVIDs outlive the token that they were given for")
	}
	lintCondition(c.Preset, c.Condition, add)
}

var (
	claimUsed = regexp.MustCompile(`\bclaims\.([A-Za-z_]\w*)`)
	callUsed  = regexp.MustCompile(`\.(startsWith|endsWith|contains|matches)\(\s*r?(?:"((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)')\s*\)`)
)

// lintCondition looks at the text of a condition, which was parsed before.
func lintCondition(preset, condition string, add report) {
	used := make(map[string]bool)
	for _, m := range claimUsed.FindAllStringSubmatch(condition, -1) {
		used[m[1]] = true
	}
	for _, name := range sortedKeys(renamed[preset]) {
		if stays := renamed[preset][name]; used[name] && !used[stays] && !(preset == "gcp" && used["sub"]) {
			add("compare claims."+stays+" instead", "the condition is on claims.%s, a name that another can have one day", name)
		}
	}
	for _, m := range callUsed.FindAllStringSubmatch(condition, -1) {
		call, text := m[1], m[2]+m[3]
		switch {
		case call == "matches" && (!strings.HasPrefix(text, "^") || !strings.HasSuffix(text, "$") || strings.HasSuffix(text, `\$`)):
			add("begin the expression with ^ and end it with $", "matches(%s) is true of any text that has it somewhere", quoted(text))
		case call == "contains":
			add("compare with ==", "contains(%s) is true of any text that has it somewhere", quoted(text))
		case call == "startsWith" && text != "" && !strings.ContainsAny(text[len(text)-1:], "/:@"):
			add("end it with the sign that follows, such as / or :", "startsWith(%s) is true of longer names too, such as %s", quoted(text), quoted(text+"-other"))
		case call == "endsWith" && text != "" && !strings.ContainsAny(text[:1], "/:@."):
			add("begin it with the sign that comes before, such as / or @", "endsWith(%s) is true of longer names too, such as %s", quoted(text), quoted("other-"+text))
		}
	}
}

func lintEntry(of *trusted, e *entry.Entry, add report) {
	preset := of.config.Preset
	has := make(map[string]string) // values by TYPE:NAME
	for _, s := range e.Selectors {
		name, value, _ := strings.Cut(s.Value, ":")
		has[s.Type+":"+name] = value
	}
	names := sortedKeys(has)
	if !slices.ContainsFunc(names, func(n string) bool { return n != "oidc:issuer" && n != "oidc:iss" && n != preset+":trust_domain" }) {
		add("add a selector that says whose tokens, such as oidc:sub", "its selectors are the issuer's alone: whoever has a token of it gets %s", e.SPIFFEID)
		return
	}
	stays := false
	for _, name := range sortedKeys(renamed[preset]) {
		id := renamed[preset][name]
		_, named := has[preset+":"+name]
		_, fixed := has[preset+":"+id]
		stays = stays || fixed
		if named && !fixed {
			add("add selector "+preset+":"+id, "selector %s:%s is a name that another can have one day", preset, name)
		}
	}
	if _, ok := has["oidc:sub"]; ok && !stays && (preset == "github" || preset == "gitlab") {
		add("add a selector by ID, such as "+preset+":"+map[string]string{"github": "repository_id", "gitlab": "project_id"}[preset],
			"selector oidc:sub has names in it that another can have one day")
	}
	if codes := narrow[preset]; codes != nil {
		_, subject := has["oidc:sub"]
		if !subject && !slices.ContainsFunc(codes, func(n string) bool { return has[preset+":"+n] != "" }) {
			add("add a selector such as "+preset+":ref or "+preset+":environment", "every branch and pipeline gets %s, whoever may push there", e.SPIFFEID)
		}
	}
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// quoted is a text that somebody else wrote, for people.
func quoted(text string) string { return strconv.Quote(attestors.Clip(text)) }

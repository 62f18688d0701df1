package issuer_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/pkg/issuer"
)

func TestAConditionIsFulfilledOrTheTokenIsRefused(t *testing.T) {
	claims := map[string]any{
		"ref": "refs/heads/main", "protected": true, "runner": json.Number("7"), "groups": []any{"a", "b"},
		"kubernetes.io": map[string]any{"namespace": "shop"},
	}
	for text, want := range map[string]bool{
		`claims.ref == "refs/heads/main"`:                       true,
		`claims.ref.startsWith("refs/heads/")`:                  true,
		`claims.ref == "refs/heads/Main"`:                       false,
		`claims.protected`:                                      false, // not of a known type: see below
		`claims.protected == true`:                              true,
		`claims.protected == "true"`:                            false,
		`claims.runner == 7`:                                    true,
		`claims.runner == "7"`:                                  false,
		`"a" in claims.groups`:                                  true,
		`claims["kubernetes.io"].namespace == "shop"`:           true,
		`claims.missing == "x"`:                                 false,
		`!(claims.missing == "x")`:                              false, // what cannot be evaluated is not fulfilled
		`has(claims.missing)`:                                   false,
		`claims.groups.all(g, claims.groups.exists(h, h == g))`: true,
	} {
		c, err := issuer.ParseCondition(text)
		if err != nil {
			if !strings.Contains(err.Error(), "true or false") || text != "claims.protected" {
				t.Errorf("%s: %v", text, err)
			}
			continue
		}
		switch err := c.Check(claims); {
		case want && err != nil:
			t.Errorf("%s: %v", text, err)
		case !want && !errors.Is(err, issuer.ErrCondition):
			t.Errorf("%s: got %v", text, err)
		}
	}
}

func TestAConditionIsBounded(t *testing.T) {
	for name, text := range map[string]string{
		"nothing":                        "",
		"a number":                       "7",
		"unknown":                        `token.sub == "x"`,
		"long":                           `claims.x == "` + strings.Repeat("x", 5000) + `"`,
		"loops":                          `[1].all(a, [1].all(b, [1].all(c, [1].all(d, a == b && c == d))))`,
		"a broken expression of letters": `claims.x.matches("(")`,
	} {
		if _, err := issuer.ParseCondition(text); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
	c, err := issuer.ParseCondition(`claims.g.all(a, claims.g.all(b, claims.g.all(c, a == b || b != c || true)))`)
	must(t, err)
	many := make([]any, 1000)
	for i := range many {
		many[i] = "x"
	}
	if err := c.Check(map[string]any{"g": many}); !errors.Is(err, issuer.ErrCondition) || !strings.Contains(err.Error(), "cost") {
		t.Errorf("got %v", err)
	}
}

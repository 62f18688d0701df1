package issuer

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"

	"cel.dev/cel-go/cel"
)

const (
	maxCondition = 4096    // bytes
	maxDepth     = 3       // loops within each other
	maxCost      = 100_000 // of one evaluation, in CEL's measure: about a millisecond
)

// Condition is what a token's claims must fulfil: an expression of the Common
// Expression Language whose value is true or false, in which "claims" has all
// claims by their names. It is safe for concurrent use.
type Condition struct{ program cel.Program }

// ParseCondition makes a condition of text such as
//
//	claims.ref == "refs/heads/main" && claims.runner_environment == "github-hosted"
func ParseCondition(text string) (*Condition, error) {
	if len(text) > maxCondition {
		return nil, fmt.Errorf("it is %d bytes long; the most is %d", len(text), maxCondition)
	}
	env, err := cel.NewEnv(
		cel.Variable("claims", cel.MapType(cel.StringType, cel.DynType)),
		cel.ASTValidators(cel.ValidateComprehensionNestingLimit(maxDepth), cel.ValidateRegexLiterals()),
	)
	if err != nil {
		return nil, err
	}
	ast, issues := env.Compile(text)
	if err := issues.Err(); err != nil {
		return nil, err
	}
	if !ast.OutputType().IsExactType(cel.BoolType) {
		return nil, fmt.Errorf("its value is of type %s, not true or false; compare claims with something", ast.OutputType())
	}
	program, err := env.Program(ast, cel.CostLimit(maxCost))
	if err != nil {
		return nil, err
	}
	return &Condition{program}, nil
}

// ErrCondition means that a token's claims do not fulfil a condition.
var ErrCondition = errors.New("the token's claims do not fulfil the condition on them")

// Check returns nil if claims fulfil the condition. That it cannot be evaluated,
// because a claim is missing or of another type, is no fulfilment.
func (c *Condition) Check(claims map[string]any) error {
	value, _, err := c.program.Eval(map[string]any{"claims": plain(claims)})
	if err != nil {
		return fmt.Errorf("%w: %s", ErrCondition, clip(err.Error()))
	}
	if fulfilled, ok := value.Value().(bool); !ok || !fulfilled {
		return ErrCondition
	}
	return nil
}

// plain makes values that CEL knows out of those that encoding/json decodes.
func plain(value any) any {
	switch v := value.(type) {
	case json.Number:
		if n, err := strconv.ParseInt(v.String(), 10, 64); err == nil {
			return n
		}
		f, err := v.Float64()
		if err != nil {
			return v.String()
		}
		return f
	case []any:
		out := make([]any, len(v))
		for i, item := range v {
			out[i] = plain(item)
		}
		return out
	case map[string]any:
		out := make(map[string]any, len(v))
		for name, item := range v {
			out[name] = plain(item)
		}
		return out
	}
	return value
}

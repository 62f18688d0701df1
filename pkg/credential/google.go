package credential

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
)

// GoogleRequest is what Google's libraries say to the executable of an external
// account, in its environment: AIP-4117, "Determining the subject token in
// executable-sourced credentials".
type GoogleRequest struct {
	Audience   string // GOOGLE_EXTERNAL_ACCOUNT_AUDIENCE
	TokenType  string // GOOGLE_EXTERNAL_ACCOUNT_TOKEN_TYPE
	OutputFile string // GOOGLE_EXTERNAL_ACCOUNT_OUTPUT_FILE; empty: none
}

// The types of token that a JWT-SVID is.
const (
	typeJWT     = "urn:ietf:params:oauth:token-type:jwt"
	typeIDToken = "urn:ietf:params:oauth:token-type:id_token"
)

// ReadGoogleRequest reads the environment.
func ReadGoogleRequest(getenv func(string) string) (GoogleRequest, error) {
	const prefix = "GOOGLE_EXTERNAL_ACCOUNT_"
	r := GoogleRequest{getenv(prefix + "AUDIENCE"), getenv(prefix + "TOKEN_TYPE"), getenv(prefix + "OUTPUT_FILE")}
	if r.TokenType == "" {
		r.TokenType = typeJWT
	}
	if r.TokenType != typeJWT && r.TokenType != typeIDToken {
		return r, fmt.Errorf("%sTOKEN_TYPE is %.100q; set subject_token_type of the credential configuration to %s", prefix, r.TokenType, typeJWT)
	}
	return r, nil
}

// TokenAudience returns the audience that a provider of a workload identity pool
// takes unless it is configured otherwise: its own name, as a URL.
func (r GoogleRequest) TokenAudience() (string, error) {
	switch {
	case r.Audience == "":
		return "", errors.New("GOOGLE_EXTERNAL_ACCOUNT_AUDIENCE is not set, as Google's libraries do; name an audience")
	case strings.HasPrefix(r.Audience, "//"):
		return "https:" + r.Audience, nil
	}
	return r.Audience, nil
}

// GoogleAnswer returns what the executable prints, and writes to the output file.
func GoogleAnswer(t Token, r GoogleRequest) ([]byte, error) {
	return jsonLine(struct {
		Version   int    `json:"version"`
		Success   bool   `json:"success"`
		TokenType string `json:"token_type"`
		Token     string `json:"id_token"`
		ExpiresAt int64  `json:"expiration_time"` // Unix seconds
	}{1, true, r.TokenType, t.Text, t.ExpiresAt.Unix()})
}

// GoogleFailure returns what the executable prints if there is no token.
func GoogleFailure(code, message string) ([]byte, error) {
	return jsonLine(struct {
		Version int    `json:"version"`
		Success bool   `json:"success"`
		Code    string `json:"code"`
		Message string `json:"message"`
	}{1, false, code, message})
}

func jsonLine(v any) ([]byte, error) {
	text, err := json.Marshal(v)
	return append(text, '\n'), err
}

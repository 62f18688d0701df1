package credential

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"time"
)

// Vault is a role of the JWT auth method of HashiCorp Vault, or of OpenBao. All
// but Namespace are required.
type Vault struct {
	Address   string // for example https://vault.example.org:8200
	Mount     string // path of the auth method: jwt, unless it was mounted elsewhere
	Role      string
	Namespace string
	Client    *http.Client
}

// VaultToken is a token of Vault. It is a secret.
type VaultToken struct {
	Token     string        `json:"token"`
	Accessor  string        `json:"accessor"`
	Policies  []string      `json:"policies"`
	Renewable bool          `json:"renewable"`
	Lease     time.Duration `json:"-"` // 0: it does not end
}

var mountForm = regexp.MustCompile(`^[\w.-]+(/[\w.-]+)*$`)

// Login logs in with a JWT-SVID: POST /auth/MOUNT/login of "JWT/OIDC auth method
// (API)".
func (v Vault) Login(ctx context.Context, token string) (*VaultToken, error) {
	address, err := parseEndpoint(v.Address)
	switch {
	case err != nil:
		return nil, err
	case v.Role == "":
		return nil, errors.New("no role is named")
	case !mountForm.MatchString(v.Mount) || strings.Contains("/"+v.Mount+"/", "/../") || strings.Contains("/"+v.Mount+"/", "/./"):
		return nil, fmt.Errorf("%.100q is no path of an auth method, such as jwt", v.Mount)
	}
	body, err := json.Marshal(map[string]string{"role": v.Role, "jwt": token})
	if err != nil {
		return nil, err
	}
	header := map[string]string{"X-Vault-Request": "true"}
	if v.Namespace != "" {
		header["X-Vault-Namespace"] = v.Namespace
	}
	status, answer, err := post(ctx, v.Client, address.JoinPath("v1", "auth", v.Mount, "login").String(), "application/json", body, header)
	if err != nil {
		return nil, fmt.Errorf("log in to Vault: %w", err)
	}
	t, err := parseLogin(status, answer, token)
	if err != nil {
		return nil, fmt.Errorf("Vault at %s does not let role %.100q in: %w", address.Host, v.Role, err)
	}
	return t, nil
}

// parseLogin reads an answer of Vault.
func parseLogin(status int, answer []byte, token string) (*VaultToken, error) {
	var said struct {
		Errors []string `json:"errors"`
		Auth   struct {
			ClientToken   string   `json:"client_token"`
			Accessor      string   `json:"accessor"`
			Policies      []string `json:"policies"`
			LeaseDuration int64    `json:"lease_duration"` // seconds
			Renewable     bool     `json:"renewable"`
		} `json:"auth"`
	}
	const longest = 100 * 365 * 24 * 60 * 60 // seconds
	switch err := json.Unmarshal(answer, &said); {
	case err != nil:
		return nil, fmt.Errorf("status %d: %w", status, errAnswer)
	case status != http.StatusOK:
		return nil, fmt.Errorf("status %d: %s", status, told(strings.Join(said.Errors, "; "), token))
	case said.Auth.ClientToken == "" || said.Auth.LeaseDuration < 0 || said.Auth.LeaseDuration > longest:
		return nil, errAnswer
	}
	a := said.Auth
	return &VaultToken{a.ClientToken, a.Accessor, a.Policies, a.Renewable, time.Duration(a.LeaseDuration) * time.Second}, nil
}

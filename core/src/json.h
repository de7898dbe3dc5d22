// A reader of JSON, for the headers of model files.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <locale>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace potstill {

// A value; what it is asked for and does not have is an exception.
struct Json {
    enum Kind { null, boolean, number, text, array, object } kind = null;
    double value = 0.0;  // of numbers and truth values
    std::string string;
    std::vector<std::pair<std::string, Json>> members;  // of arrays without names

    const Json *find(const std::string &name) const {
        for (const auto &member : members)
            if (kind == object && member.first == name) return &member.second;
        return nullptr;
    }
    const Json &at(const std::string &name) const {
        const Json *found = find(name);
        if (!found) throw std::runtime_error("'" + name + "' is missing");
        return *found;
    }
    double as_number(const std::string &name) const { return expect(name, number).value; }
    const std::string &as_text(const std::string &name) const { return expect(name, text).string; }
    int64_t as_integer(const std::string &name) const {
        const double x = as_number(name);
        if (!(x > -9e15 && x < 9e15) || double(int64_t(x)) != x)
            throw std::runtime_error("'" + name + "' is no whole number");
        return int64_t(x);
    }
    const Json &expect(const std::string &name, Kind wanted) const {
        const Json &found = at(name);
        if (found.kind != wanted) throw std::runtime_error("'" + name + "' is of the wrong type");
        return found;
    }
};

class JsonReader {
  public:
    explicit JsonReader(const std::string &source) : s_(source) {}

    Json read() {
        Json value = next(0);
        skip();
        if (at_ != s_.size()) wrong();
        return value;
    }

  private:
    const std::string &s_;
    size_t at_ = 0;

    [[noreturn]] static void wrong() { throw std::runtime_error("it is no JSON"); }
    void skip() {
        while (at_ < s_.size() && (s_[at_] == ' ' || s_[at_] == '\n' || s_[at_] == '\t' || s_[at_] == '\r'))
            ++at_;
    }
    char peek() {
        skip();
        if (at_ == s_.size()) wrong();
        return s_[at_];
    }
    void take(char c) {
        if (peek() != c) wrong();
        ++at_;
    }
    bool takes(const std::string &word) {
        if (s_.compare(at_, word.size(), word) != 0) return false;
        at_ += word.size();
        return true;
    }

    Json next(int depth) {
        if (depth > 64) wrong();
        Json v;
        const char c = peek();
        if (c == '{' || c == '[') {
            const char end = c == '{' ? '}' : ']';
            v.kind = c == '{' ? Json::object : Json::array;
            ++at_;
            for (bool first = true; peek() != end; first = false) {
                if (!first) take(',');
                std::string name;
                if (c == '{') name = (take('"'), characters()), take(':');
                v.members.emplace_back(name, next(depth + 1));
            }
            ++at_;
        } else if (c == '"') {
            ++at_, v.kind = Json::text, v.string = characters();
        } else if (takes("true")) {
            v.kind = Json::boolean, v.value = 1.0;
        } else if (takes("false")) {
            v.kind = Json::boolean;
        } else if (!takes("null")) {
            v.kind = Json::number, v.value = digits();
        }
        return v;
    }

    double digits() {
        const size_t end = s_.find_first_not_of("+-.0123456789eE", at_);
        std::istringstream in(s_.substr(at_, end == std::string::npos ? end : end - at_));
        in.imbue(std::locale::classic());
        double value;
        if (!(in >> value) || in.peek() != EOF) wrong();
        at_ = end == std::string::npos ? s_.size() : end;
        return value;
    }

    // A string behind its first quotation mark.
    std::string characters() {
        std::string out;
        for (;;) {
            if (at_ == s_.size()) wrong();
            const char c = s_[at_++];
            if (c == '"') return out;
            if (c != '\\') {
                out += c;
                continue;
            }
            if (at_ == s_.size()) wrong();
            const char escaped = s_[at_++];
            static const std::string from = "\"\\/bfnrt", to = "\"\\/\b\f\n\r\t";
            const size_t k = from.find(escaped);
            if (k != std::string::npos)
                out += to[k];
            else if (escaped == 'u')
                encode(code_point(), out);
            else
                wrong();
        }
    }
    uint32_t code_point() {
        uint32_t code = hexadecimal();
        if (code >= 0xD800 && code < 0xDC00 && takes("\\u"))
            code = 0x10000 + ((code - 0xD800) << 10) + (hexadecimal() - 0xDC00);
        return code;
    }
    uint32_t hexadecimal() {
        const std::string four = s_.substr(at_, 4);
        if (four.size() != 4 || four.find_first_not_of("0123456789abcdefABCDEF") != std::string::npos)
            wrong();
        at_ += 4;
        return uint32_t(std::strtoul(four.c_str(), nullptr, 16));
    }
    static void encode(uint32_t code, std::string &out) {
        if (code < 0x80) {
            out += char(code);
            return;
        }
        const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
        static const unsigned lead[] = {0, 0xC0, 0xE0, 0xF0};
        out += char(lead[more] | (code >> (6 * more)));
        for (int k = more - 1; k >= 0; --k) out += char(0x80 | ((code >> (6 * k)) & 0x3F));
    }
};

}  // namespace potstill
